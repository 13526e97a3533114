//! The machine as the checkpoint engine sees it.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::lifecycle::MachineState;
use super::shared::Shared;
use super::{Machine, build};
use crate::guest::{
    Description, DirtyLog, Guest, GuestDisk, GuestError, HostWrites, MemoryFill, MemoryRegion,
    PauseTiming,
};
use crate::kvmstate;
use crate::state::StateSection;
use crate::state::board::ClockV1;

impl Shared {
    fn refuse_shut_off(&self) -> Result<(), GuestError> {
        match self.lifecycle.state() {
            state @ MachineState::Shutoff { .. } => Err(GuestError::State {
                state: state.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Stops the vCPUs, and begins again where a guest's request came in between.
    fn stop_vcpus(&self) -> Result<(), GuestError> {
        loop {
            self.exclusion.begin_pause();
            let stopped = self.refuse_shut_off().and_then(|()| Ok(self.close_gate()?));
            if let Err(error) = stopped {
                self.exclusion.end_pause();
                return Err(error);
            }
            if !self.exclusion.has_request() {
                return Ok(());
            }
            self.gate.open();
            self.exclusion.end_pause();
        }
    }

    fn pause_for_engine(&self) -> Result<PauseTiming, GuestError> {
        let start = Instant::now();
        self.stop_vcpus()?;
        let stopped = Instant::now();
        let mut quiesced = self.quiesced.lock().unwrap_or_else(PoisonError::into_inner);
        if *quiesced == 0
            && let Err(timeout) = self.devices.quiesce()
        {
            drop(quiesced);
            self.gate.open();
            self.exclusion.end_pause();
            return Err(GuestError::Drain {
                device: timeout.device,
            });
        }
        *quiesced += 1;
        Ok(PauseTiming {
            kick: stopped - start,
            quiesce: stopped.elapsed(),
        })
    }

    fn resume_for_engine(&self) {
        let mut quiesced = self.quiesced.lock().unwrap_or_else(PoisonError::into_inner);
        *quiesced = quiesced
            .checked_sub(1)
            .expect("every resume follows a pause");
        if *quiesced == 0 {
            self.devices.resume();
        }
        drop(quiesced);
        self.gate.open();
        self.exclusion.end_pause();
    }

    fn save_sections(&self) -> Result<Vec<StateSection>, GuestError> {
        let vcpus: Vec<_> = self.vcpus.iter().map(|vcpu| &vcpu.fd).collect();
        let mut sections =
            kvmstate::save(&self.vm, &vcpus, &self.msrs).map_err(|error| GuestError::Save {
                what: "the state that KVM keeps".to_owned(),
                source: Box::new(error),
            })?;
        self.keep_paused_clock(&mut sections);
        sections.extend(self.devices.all().flat_map(|device| device.save()));
        sections.push(StateSection::encode(0, &build::machine_layout(&self.spec)));
        Ok(sections)
    }

    /// A guest that its user has paused has the clock of that moment, although KVM's runs on.
    fn keep_paused_clock(&self, sections: &mut [StateSection]) {
        let Some(guest_ns) = *self.lock_paused_clock() else {
            return;
        };
        let now = kvmstate::save_clock(&self.vm);
        for section in sections {
            if let (true, Ok(now)) = (section.kind == "clock", &now) {
                *section = StateSection::encode(0, &ClockV1 { guest_ns, ..*now });
            }
        }
    }
}

impl Guest for Machine {
    fn regions(&self) -> &[MemoryRegion] {
        self.shared.ram.regions()
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.shared.dirty_log
    }

    fn host_writes(&self) -> &HostWrites {
        self.shared.ram.host_writes()
    }

    fn check_checkpointable(&self) -> Result<(), GuestError> {
        self.shared.refuse_shut_off()
    }

    fn pause(&self) -> Result<PauseTiming, GuestError> {
        self.shared.pause_for_engine()
    }

    fn resume(&self) {
        self.shared.resume_for_engine();
    }

    fn last_resumed(&self) -> Option<Instant> {
        self.shared.gate.last_left()
    }

    fn filling(&self) -> Option<Arc<dyn MemoryFill>> {
        let mut filling = self.shared.lock_filling();
        // Asked once it is complete it is forgotten, and with it the image.
        if filling
            .as_ref()
            .is_some_and(|fill| fill.wait(Duration::ZERO))
        {
            *filling = None;
        }
        filling.clone()
    }

    fn save_state(&self) -> Result<Vec<StateSection>, GuestError> {
        self.shared.save_sections()
    }

    fn disks(&self) -> Vec<Arc<dyn GuestDisk>> {
        let devices = self.shared.devices.virtio.iter();
        devices.filter_map(|device| device.disk()).collect()
    }

    fn describe(&self) -> Description {
        let spec = &self.shared.spec;
        Description {
            name: spec.name.clone(),
            uuid: spec.uuid,
            domain_xml: spec.domain_xml.clone(),
            vcpu_count: spec.cpu.vcpu_count,
            facts: self.shared.facts.clone(),
        }
    }
}
