//! The guest's time stamp counter across a save and a restore.

use std::time::Duration;

use kvm_ioctls::{Cap, VcpuFd, VmFd};

use super::{KvmStateError, msrs};
use crate::state::vcpu::{MsrV1, TscV1};
use crate::sys;

/// Relative difference of rates, in parts per million, below which a counter is not scaled: what
/// the calibration of one host varies by between boots.
const RATE_TOLERANCE_PPM: u64 = 250;

/// How far, in ticks, host plus offset may be from the guest's counter for the offset to be
/// believed: the two are read some microseconds apart.
const OFFSET_TOLERANCE: u64 = 1 << 24;

/// The moment at which all vCPUs' counters go on from the moment of the save.
///
/// One for all vCPUs of a restore: each has its own offset from the host's counter, and the
/// difference between the two moments is added to all of them alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscTarget {
    saved_host: u64,
    host: u64,
    passed: Duration,
}

impl TscTarget {
    /// Lets counters go on now from when `first` (any of the vCPUs) was saved, and `passed` later.
    pub fn now(first: &TscV1, passed: Duration) -> Self {
        Self {
            saved_host: first.host,
            host: sys::tsc::read(),
            passed,
        }
    }

    /// Returns the offset that continues `saved`.
    fn offset(self, saved: &TscV1) -> u64 {
        let measured = saved.guest.wrapping_sub(saved.host);
        let near = |offset: &u64| {
            let difference = offset.wrapping_sub(measured);
            difference.min(difference.wrapping_neg()) < OFFSET_TOLERANCE
        };
        // KVM's own number is exact; it is another one where the counter was scaled.
        let old = saved.offset.filter(near).unwrap_or(measured);
        let ticks = self.passed.as_nanos() * u128::from(saved.khz) / 1_000_000;
        old.wrapping_add(self.saved_host)
            .wrapping_sub(self.host)
            .wrapping_add(u64::try_from(ticks).unwrap_or(u64::MAX))
    }
}

pub(super) fn save(vcpu: &VcpuFd, number: u32) -> Result<TscV1, KvmStateError> {
    let guest = msrs::read(vcpu, msrs::TSC).ok_or(KvmStateError::GetMsr {
        vcpu: number,
        index: msrs::TSC,
    })?;
    Ok(TscV1 {
        host: sys::tsc::read(),
        guest,
        khz: vcpu
            .get_tsc_khz()
            .map_err(KvmStateError::vcpu("read the TSC rate", number))?,
        // Missing before Linux 5.16; then the two counters' difference is used.
        offset: sys::kvm::get_tsc_offset(vcpu).ok(),
    })
}

/// Gives the counter the saved rate.
pub(super) fn restore_rate(
    vm: &VmFd,
    vcpu: &VcpuFd,
    number: u32,
    saved: &TscV1,
) -> Result<(), KvmStateError> {
    let host_khz = vcpu
        .get_tsc_khz()
        .map_err(KvmStateError::vcpu("read the TSC rate", number))?;
    let difference = u64::from(host_khz.abs_diff(saved.khz));
    if saved.khz == 0 || difference * 1_000_000 <= u64::from(host_khz) * RATE_TOLERANCE_PPM {
        return Ok(());
    }
    if !vm.check_extension(Cap::TscControl) {
        return Err(KvmStateError::TscRate {
            saved_khz: saved.khz,
            host_khz,
        });
    }
    vcpu.set_tsc_khz(saved.khz)
        .map_err(KvmStateError::vcpu("set the TSC rate", number))
}

/// Puts the counter where `target` says, and returns by how much (wrapping) it missed.
///
/// It misses where KVM cannot offset counters: they follow the host's then, and what the guest
/// has programmed in ticks has to be moved by as much.
pub(super) fn restore_value(vcpu: &VcpuFd, number: u32, saved: &TscV1, target: TscTarget) -> u64 {
    let offset = target.offset(saved);
    // Some KVMs accept any offset and ignore it, so it is read back.
    let exact = sys::kvm::set_tsc_offset(vcpu, offset).is_ok()
        && sys::kvm::get_tsc_offset(vcpu).is_ok_and(|now| now == offset);
    if exact {
        return 0;
    }
    let wanted = MsrV1 {
        index: msrs::TSC,
        value: sys::tsc::read().wrapping_add(offset),
    };
    if msrs::write(vcpu, number, &[wanted]).is_err() {
        log::debug!("KVM refuses to set vCPU {number}'s time stamp counter");
    }
    let host = sys::tsc::read();
    msrs::read(vcpu, msrs::TSC).map_or(0, |guest| guest.wrapping_sub(host.wrapping_add(offset)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: TscV1 = TscV1 {
        khz: 2_000_000,
        guest: 5_000,
        host: 105_000,
        offset: Some(0_u64.wrapping_sub(100_001)),
    };

    #[test]
    fn a_counter_goes_on_where_it_stopped() {
        let target = TscTarget {
            saved_host: 105_000,
            host: 905_000,
            passed: Duration::ZERO,
        };
        let guest = 905_000_u64.wrapping_add(target.offset(&SAVED));
        assert_eq!(guest, 4_999, "by KVM's offset, not by the two reads");
    }

    #[test]
    fn counters_that_differed_differ_by_as_much_again() {
        let target = TscTarget {
            saved_host: 105_000,
            host: 7,
            passed: Duration::from_micros(3),
        };
        let other = TscV1 {
            guest: 9_000,
            host: 106_000,
            offset: Some(0_u64.wrapping_sub(97_001)),
            ..SAVED
        };
        let difference = target.offset(&other).wrapping_sub(target.offset(&SAVED));
        assert_eq!(difference, 3_000);
    }

    #[test]
    fn an_offset_that_does_not_fit_the_counters_is_not_believed() {
        let scaled = TscV1 {
            offset: Some(1 << 60),
            ..SAVED
        };
        let target = TscTarget {
            saved_host: 105_000,
            host: 105_000,
            passed: Duration::ZERO,
        };
        assert_eq!(105_000_u64.wrapping_add(target.offset(&scaled)), 5_000);
    }
}
