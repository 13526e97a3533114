//! What an exit means.

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};

use super::Vcpu;
use crate::machine::bus::GuestRequest;
use crate::machine::shared::Shared;
use crate::sys::kvm_run::{Exit, VcpuRun};

/// What follows from an exit.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The guest goes on.
    Continue,
    /// The guest wants something of the machine.
    Request(GuestRequest),
    /// The vCPU cannot go on.
    Crash(String),
}

impl From<Option<GuestRequest>> for Outcome {
    fn from(request: Option<GuestRequest>) -> Self {
        request.map_or(Self::Continue, Self::Request)
    }
}

/// Handles one exit; `data` is a buffer that is kept between exits.
pub(super) fn dispatch(
    shared: &Shared,
    vcpu: &Vcpu,
    run: &mut VcpuRun,
    data: &mut Vec<u8>,
    exit: &Exit,
) -> Outcome {
    match exit {
        Exit::PortOut(access) => {
            run.port_data(data);
            shared
                .ports
                .write(access.port.into(), access.unit_bytes, data)
                .into()
        }
        Exit::PortIn(access) => {
            data.clear();
            data.resize(access.unit_bytes * access.count, 0);
            shared
                .ports
                .read(access.port.into(), access.unit_bytes, data);
            run.set_port_data(data);
            Outcome::Continue
        }
        Exit::MmioWrite {
            gpa,
            data: written,
            len,
        } => shared.mmio.write(*gpa, *len, &written[..*len]).into(),
        Exit::MmioRead { gpa, len } => {
            let mut answer = [0; 8];
            shared.mmio.read(*gpa, *len, &mut answer[..*len]);
            run.set_mmio_data(&answer[..*len]);
            Outcome::Continue
        }
        Exit::Interrupted => Outcome::Continue,
        Exit::SystemEvent { kind } => match *kind {
            KVM_SYSTEM_EVENT_SHUTDOWN => Outcome::Request(GuestRequest::PowerOff),
            KVM_SYSTEM_EVENT_RESET => Outcome::Request(GuestRequest::Reset),
            KVM_SYSTEM_EVENT_CRASH => crash(vcpu, "the guest reported a crash"),
            kind => crash(vcpu, &format!("system event {kind}")),
        },
        Exit::Shutdown => crash(vcpu, "triple fault"),
        Exit::Halt => crash(vcpu, "halted with nothing that could wake it"),
        Exit::FailEntry { reason } => crash(vcpu, &format!("the CPU refused entry: {reason:#x}")),
        Exit::InternalError { suberror, details } => crash(
            vcpu,
            &format!("KVM internal error {suberror}, details {details:x?}"),
        ),
        Exit::Other { reason } => crash(vcpu, &format!("unexpected exit {reason}")),
    }
}

fn crash(vcpu: &Vcpu, why: &str) -> Outcome {
    Outcome::Crash(format!(
        "{why} on vCPU {}, {}",
        vcpu.number,
        vcpu.whereabouts()
    ))
}
