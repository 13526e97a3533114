//! A guest's state as a VMM sees it: named, versioned sections.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{ForeignError, KvmHandle};
use crate::kvmstate::ClockPolicy;
use crate::state::{HostFacts, SECTION_BYTES_MAX, StateSection, StateSet};

/// The longest name of a section.
pub const KIND_BYTES_MAX: usize = 64;

/// Sections that this library writes itself.
const OWN_KINDS: [&str; 4] = ["vcpu", "irqchip", "pit", "clock"];

/// The sections of one saved guest, KVM's and the VMM's.
#[derive(Debug, Default)]
pub struct SavedState {
    pub(super) set: StateSet,
    pub(super) facts: HostFacts,
    kvm: Option<Arc<KvmHandle>>,
}

impl SavedState {
    /// Makes a state of what an image holds.
    pub fn new(set: StateSet) -> Self {
        Self {
            set,
            ..Self::default()
        }
    }

    /// Makes an empty state that uses `kvm` rather than opening its own.
    pub(super) fn of_kvm(kvm: Arc<KvmHandle>) -> Self {
        Self {
            kvm: Some(kvm),
            ..Self::default()
        }
    }

    /// Adds a section of the VMM's own; the same kind and instance twice is an error.
    pub fn add(
        &mut self,
        kind: &str,
        instance: u32,
        version: u16,
        payload: &[u8],
    ) -> Result<(), ForeignError> {
        let invalid = |text: String| Err(ForeignError::Invalid(text));
        if !(1..=KIND_BYTES_MAX).contains(&kind.len()) || kind.chars().any(char::is_control) {
            return invalid(format!(
                "kind: from 1 to {KIND_BYTES_MAX} bytes of text, not {kind:?}"
            ));
        }
        if OWN_KINDS.contains(&kind) {
            return invalid(format!(
                "kind: {kind:?} is what lvp_kvm_state_save() writes; take another name"
            ));
        }
        if payload.len() > SECTION_BYTES_MAX {
            return invalid(format!(
                "section {kind:?} has {} bytes; {SECTION_BYTES_MAX} are the most",
                payload.len()
            ));
        }
        self.append(vec![StateSection {
            kind: kind.to_owned(),
            instance,
            version,
            payload: payload.to_vec(),
        }])
    }

    fn append(&mut self, sections: Vec<StateSection>) -> Result<(), ForeignError> {
        let all = [self.set.sections().to_vec(), sections].concat();
        self.set = StateSet::new(all)?;
        Ok(())
    }

    /// Adds what KVM keeps of a VM whose vCPUs are all stopped.
    pub fn save_kvm(
        &mut self,
        vm: BorrowedFd<'_>,
        vcpus: &[BorrowedFd<'_>],
    ) -> Result<(), ForeignError> {
        let (sections, facts) = self.kvm()?.save(vm, vcpus)?;
        self.append(sections)?;
        self.facts = facts;
        Ok(())
    }

    /// Sets what KVM keeps, in a VM whose vCPUs never ran; its sections are gone afterwards.
    pub fn restore_kvm(
        &mut self,
        vm: BorrowedFd<'_>,
        vcpus: &[BorrowedFd<'_>],
        policy: ClockPolicy,
    ) -> Result<(), ForeignError> {
        let kvm = self.kvm()?;
        // A copy: where it fails, nothing is taken.
        let mut set = self.set.clone();
        kvm.restore(vm, vcpus, &mut set, policy)?;
        self.set = set;
        Ok(())
    }

    fn kvm(&self) -> Result<Arc<KvmHandle>, ForeignError> {
        match &self.kvm {
            Some(kvm) => Ok(kvm.clone()),
            None => Ok(Arc::new(KvmHandle::open(None)?)),
        }
    }

    /// Returns all sections.
    pub fn sections(&self) -> &[StateSection] {
        self.set.sections()
    }

    /// Returns a section, or `None` where there is none of this kind and instance.
    pub fn find(&self, kind: &str, instance: u32) -> Option<&StateSection> {
        self.sections()
            .iter()
            .find(|section| section.kind == kind && section.instance == instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_comes_back_and_names_that_are_taken_are_refused() {
        let mut state = SavedState::default();
        state.add("nic", 1, 7, b"bytes").unwrap();
        let section = state.find("nic", 1).unwrap();
        assert_eq!((section.version, &section.payload[..]), (7, &b"bytes"[..]));
        assert!(state.find("nic", 0).is_none());
        for (kind, instance) in [("nic", 1), ("", 0), ("vcpu", 9), ("a\nb", 0)] {
            assert!(state.add(kind, instance, 0, b"").is_err(), "{kind:?}");
        }
        let long = "x".repeat(KIND_BYTES_MAX + 1);
        assert!(state.add(&long, 0, 0, b"").is_err());
        assert!(
            state
                .add("big", 0, 0, &vec![0; SECTION_BYTES_MAX + 1])
                .is_err()
        );
        assert_eq!(state.sections().len(), 1);
    }
}
