//! The host's time stamp counter.
#![expect(unsafe_code, reason = "the rdtsc intrinsic is an unsafe function")]

/// Returns the host's time stamp counter.
///
/// Not ordered with the loads and stores around it: callers compare values that are microseconds
/// apart.
pub fn read() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC; a kernel that forbids it to user space (CR4.TSD through
    // prctl) raises SIGSEGV, which is no memory unsafety.
    unsafe { std::arch::x86_64::_rdtsc() }
}
