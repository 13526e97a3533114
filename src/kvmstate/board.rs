//! Interrupt controllers, timer and clock: what a VM has once.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;

use super::{ClockPolicy, KvmStateError};
use crate::state::board::{ClockV1, IrqchipV1, PitV1};

/// What a VM has once.
#[derive(Clone, Copy, Debug)]
pub struct Board {
    /// Interrupt controllers.
    pub irqchip: IrqchipV1,
    /// Timer.
    pub pit: PitV1,
    /// Clock.
    pub clock: ClockV1,
}

/// Saves clock, interrupt controllers and timer.
pub fn save_board(vm: &VmFd) -> Result<Board, KvmStateError> {
    Ok(Board {
        clock: save_clock(vm)?,
        irqchip: get_irqchips(vm).map_err(KvmStateError::vm("read an interrupt controller"))?,
        pit: get_pit(vm).map_err(KvmStateError::vm("read the PIT"))?,
    })
}

fn get_irqchips(vm: &VmFd) -> Result<IrqchipV1, kvm_ioctls::Error> {
    Ok(IrqchipV1 {
        pic_master: get_irqchip(vm, KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: get_irqchip(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: get_irqchip(vm, KVM_IRQCHIP_IOAPIC)?,
    })
}

fn get_irqchip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, kvm_ioctls::Error> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)?;
    Ok(chip)
}

fn get_pit(vm: &VmFd) -> Result<PitV1, kvm_ioctls::Error> {
    Ok(PitV1 {
        channels: vm.get_pit2()?,
    })
}

/// The chips that KVM has of a VM that somebody else made.
pub(super) struct Chips {
    pub(super) irqchip: Option<IrqchipV1>,
    pub(super) pit: Option<PitV1>,
}

impl Chips {
    /// Saves those that are there: the VMM may have chips of its own instead.
    pub(super) fn save(vm: &VmFd) -> Result<Self, KvmStateError> {
        fn present<T>(chip: Result<T, kvm_ioctls::Error>) -> Result<Option<T>, kvm_ioctls::Error> {
            match chip {
                Ok(chip) => Ok(Some(chip)),
                Err(error) if error.errno() == libc::ENXIO => Ok(None),
                Err(error) => Err(error),
            }
        }
        Ok(Self {
            irqchip: present(get_irqchips(vm))
                .map_err(KvmStateError::vm("read an interrupt controller"))?,
            pit: present(get_pit(vm)).map_err(KvmStateError::vm("read the PIT"))?,
        })
    }

    pub(super) fn restore(&self, vm: &VmFd) -> Result<(), KvmStateError> {
        if let Some(irqchip) = &self.irqchip {
            set_irqchips(vm, irqchip)?;
        }
        self.pit.as_ref().map_or(Ok(()), |pit| set_pit(vm, pit))
    }
}

/// Restores clock, interrupt controllers and timer; the clock moved on by `passed`.
pub fn restore_board(vm: &VmFd, board: &Board, passed: Duration) -> Result<(), KvmStateError> {
    let passed_ns = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
    set_clock(vm, board.clock.guest_ns.saturating_add(passed_ns))?;
    restore_chips(vm, &board.irqchip, &board.pit)
}

/// Restores interrupt controllers and timer; the clock goes on.
pub fn restore_chips(vm: &VmFd, irqchip: &IrqchipV1, pit: &PitV1) -> Result<(), KvmStateError> {
    set_irqchips(vm, irqchip)?;
    set_pit(vm, pit)
}

fn set_irqchips(vm: &VmFd, irqchip: &IrqchipV1) -> Result<(), KvmStateError> {
    let chips = [
        (KVM_IRQCHIP_PIC_MASTER, &irqchip.pic_master),
        (KVM_IRQCHIP_PIC_SLAVE, &irqchip.pic_slave),
        (KVM_IRQCHIP_IOAPIC, &irqchip.ioapic),
    ];
    for (chip_id, saved) in chips {
        // The number comes from us, not from the file: it chooses which chip KVM overwrites.
        let chip = kvm_irqchip { chip_id, ..*saved };
        vm.set_irqchip(&chip)
            .map_err(KvmStateError::vm("set an interrupt controller"))?;
    }
    Ok(())
}

fn set_pit(vm: &VmFd, pit: &PitV1) -> Result<(), KvmStateError> {
    vm.set_pit2(&pit.channels)
        .map_err(KvmStateError::vm("set the PIT"))
}

/// Reads the guest's paravirtual clock and the wall clock of the same moment.
pub fn save_clock(vm: &VmFd) -> Result<ClockV1, KvmStateError> {
    let clock = vm
        .get_clock()
        .map_err(KvmStateError::vm("read the clock"))?;
    let realtime_ns = if clock.flags & KVM_CLOCK_REALTIME != 0 {
        clock.realtime
    } else {
        now_ns()
    };
    Ok(ClockV1 {
        guest_ns: clock.clock,
        realtime_ns,
    })
}

/// Sets the guest's paravirtual clock.
pub fn set_clock(vm: &VmFd, guest_ns: u64) -> Result<(), KvmStateError> {
    let clock = kvm_clock_data {
        clock: guest_ns,
        ..Default::default()
    };
    vm.set_clock(&clock)
        .map_err(KvmStateError::vm("set the clock"))
}

/// Returns by how much the guest's clocks are moved on under `policy`.
///
/// None where the wall clock went backward since: a guest's clock never does.
pub(super) fn passed_since(clock: &ClockV1, policy: ClockPolicy) -> Duration {
    match policy {
        ClockPolicy::Continue => Duration::ZERO,
        ClockPolicy::Realtime => Duration::from_nanos(now_ns().saturating_sub(clock.realtime_ns)),
    }
}

fn now_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
