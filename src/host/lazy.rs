//! A machine that runs while its memory still comes from an image.

use std::sync::{Arc, Weak};

use crate::host::HostError;
use crate::machine::spec::MachineSpec;
use crate::machine::{Machine, describe_chain};
use crate::restore::eager::FillError;
use crate::restore::lazy::LazyFill;
use crate::store::ImageReader;

/// Makes a machine from an image whose memory comes as it is touched.
///
/// A damaged chunk that is found late ends the machine, with an error that names it.
pub(super) fn restore(
    image: &Arc<ImageReader>,
    mut spec: MachineSpec,
    track: bool,
) -> Result<Arc<Machine>, HostError> {
    if spec.memory.locked {
        let reason = "its memory is locked, so that all of it must be there".to_owned();
        return Err(FillError::NotLazy { reason }.into());
    }
    // It would make all of it before anything can be missing.
    spec.memory.preallocate = false;
    let state = image.sections()?;
    let unfilled = Machine::build_for_restore(spec)?;
    let fill = LazyFill::start(image.clone(), unfilled.regions())?;
    // KVM touches memory when it takes the state: until there is a machine to end, its memory is
    // given up, so that this thread is not held for ever.
    let early = Arc::downgrade(&fill);
    fill.on_failure(Box::new(move |_| give_up(&early)));
    unfilled
        .host_writes()
        .set_discard_observer(Some(fill.clone()));
    let machine = if track {
        unfilled.finish_tracked(state)?
    } else {
        unfilled.finish(state)?
    };
    if let Some(failure) = fill.failure() {
        return Err(FillError::Late(failure).into());
    }
    let machine = Arc::new(machine);
    machine.set_filling(fill.clone());
    let (ended, fill_of) = (Arc::downgrade(&machine), Arc::downgrade(&fill));
    fill.on_failure(Box::new(move |error| {
        if let Some(machine) = ended.upgrade() {
            machine.fail(&format!(
                "its memory cannot be restored: {}",
                describe_chain(&*error)
            ));
        }
        give_up(&fill_of);
    }));
    Ok(machine)
}

fn give_up(fill: &Weak<LazyFill>) {
    if let Some(fill) = fill.upgrade() {
        fill.give_up();
    }
}
