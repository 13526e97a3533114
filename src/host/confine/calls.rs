//! System calls: what the threads of a machine make, and what becomes of all others (seccomp(2)).

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Compare,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// What becomes of a system call that no part of a machine makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forbidden {
    /// It fails as on a kernel that does not have it.
    Refuse,
    /// The process is killed.
    Kill,
    /// It is made, and the kernel's audit log tells of it: to find out what a list lacks.
    Log,
}

/// Calls that are made with any arguments.
const CALLS: &[c_long] = &[
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munlock,
    libc::SYS_munmap,
    libc::SYS_userfaultfd,
    // Files, which Landlock has its own say about.
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readahead,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
    libc::SYS_truncate,
    libc::SYS_umask,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
    // Waiting.
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_select,
    libc::SYS_signalfd4,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    // Sockets that are there: consoles, the control socket and its clients. None is made.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Threads, and signals between them.
    libc::SYS_arch_prctl,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_get_robust_list,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getpriority,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getattr,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_setpriority,
    libc::SYS_sigaltstack,
    // What the process is, and what time it is.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getrandom,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_sysinfo,
    libc::SYS_time,
    libc::SYS_times,
    libc::SYS_uname,
];

/// Kinds of ioctls, by the byte that tells whose they are: KVM's first, which are most.
const IOCTL_KINDS: [u64; 6] = [
    0xAE, // KVM.
    0xAA, // userfaultfd.
    0x66, // Files, and the page map.
    0x94, // Copies that share blocks.
    0x12, // Block devices.
    0x54, // Terminals, taps, descriptors.
];
/// The byte of an ioctl that tells whose it is.
const IOCTL_KIND: u64 = 0xff00;
/// Types a character into a terminal.
const TIOCSTI: u64 = 0x5412;

/// Options of prctl(2): names of threads and of memory, and what is only asked for.
const PRCTL_OPTIONS: [u64; 8] = [
    libc::PR_SET_NAME as u64,
    libc::PR_GET_NAME as u64,
    0x5356_4d41, // PR_SET_VMA
    libc::PR_SET_TIMERSLACK as u64,
    libc::PR_GET_TIMERSLACK as u64,
    libc::PR_GET_DUMPABLE as u64,
    libc::PR_GET_NO_NEW_PRIVS as u64,
    libc::PR_GET_SECCOMP as u64,
];

/// Flags of a clone(2) that make a namespace.
const NEW_NAMESPACES: u64 = 0x7e02_0080;

/// Allows a call under conditions, any list of which will do.
fn allow_if(
    rules: &mut BTreeMap<i64, Vec<SeccompRule>>,
    call: c_long,
    any: impl IntoIterator<Item = Vec<(u8, Compare, u64)>>,
) -> Result<(), seccompiler::BackendError> {
    let rule = |all: Vec<(u8, Compare, u64)>| {
        let conditions = all.into_iter().map(|(argument, compare, value)| {
            // Of an `int` the upper half of a register may be anything.
            SeccompCondition::new(argument, Width::Dword, compare, value)
        });
        SeccompRule::new(conditions.collect::<Result<_, _>>()?)
    };
    let list = any.into_iter().map(rule).collect::<Result<_, _>>()?;
    rules.insert(call, list);
    Ok(())
}

/// Makes the filter of what is answered as by an older kernel, whatever becomes of other calls: the
/// C library makes threads by clone(2) then, whose arguments can be looked at.
fn older_kernel() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let absent = SeccompAction::Errno(libc::ENOSYS as u32);
    SeccompFilter::new(rules, SeccompAction::Allow, absent, TargetArch::x86_64)?.try_into()
}

/// Makes the filter.
fn program(forbidden: Forbidden) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let is_kind = |kind: u64| vec![(1, Compare::MaskedEq(IOCTL_KIND), kind << 8)];
    let ioctls = IOCTL_KINDS.map(|kind| {
        let mut conditions = is_kind(kind);
        if kind == TIOCSTI >> 8 {
            conditions.push((1, Compare::Ne, TIOCSTI));
        }
        conditions
    });
    allow_if(&mut rules, libc::SYS_ioctl, ioctls)?;
    // No memory becomes a program.
    let without_exec = || [vec![(2, Compare::MaskedEq(libc::PROT_EXEC as u64), 0)]];
    allow_if(&mut rules, libc::SYS_mmap, without_exec())?;
    allow_if(&mut rules, libc::SYS_mprotect, without_exec())?;
    // Threads; the other filter has the last word on the second call.
    rules.insert(libc::SYS_clone3, Vec::new());
    let thread = vec![
        (0, Compare::MaskedEq(NEW_NAMESPACES), 0),
        (
            0,
            Compare::MaskedEq(libc::CLONE_THREAD as u64),
            libc::CLONE_THREAD as u64,
        ),
    ];
    allow_if(&mut rules, libc::SYS_clone, [thread])?;
    let local = vec![(0, Compare::Eq, libc::AF_UNIX as u64)];
    allow_if(&mut rules, libc::SYS_socketpair, [local])?;
    let own = vec![(0, Compare::Eq, u64::from(std::process::id()))];
    allow_if(&mut rules, libc::SYS_tgkill, [own])?;
    let options = PRCTL_OPTIONS.map(|option| vec![(0, Compare::Eq, option)]);
    allow_if(&mut rules, libc::SYS_prctl, options)?;
    // Limits are read: a new one's address would not be null.
    let no_new_limit = SeccompCondition::new(2, Width::Qword, Compare::Eq, 0)?;
    let only_read = vec![SeccompRule::new(vec![no_new_limit])?];
    rules.insert(libc::SYS_prlimit64, only_read);
    let otherwise = match forbidden {
        // As a kernel without it, so that libraries take another way where there is one.
        Forbidden::Refuse => SeccompAction::Errno(libc::ENOSYS as u32),
        Forbidden::Kill => SeccompAction::KillProcess,
        Forbidden::Log => SeccompAction::Log,
    };
    let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64)?;
    filter.try_into()
}

/// Forbids all other calls to the calling thread, and to those that it starts. A kernel without
/// seccomp allows them, which is a warning.
pub(super) fn forbid(forbidden: Forbidden) -> io::Result<()> {
    // The order matters: the second one is itself a system call that the first lets pass.
    for program in [older_kernel(), program(forbidden)] {
        let program = program.map_err(io::Error::other)?;
        match seccompiler::apply_filter(&program) {
            Err(seccompiler::Error::Seccomp(error))
                if error.raw_os_error() == Some(libc::EINVAL) =>
            {
                log::warn!("this kernel has no seccomp: the process may make any system call");
                return Ok(());
            }
            applied => applied.map_err(io::Error::other)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_is_short_enough_for_the_kernel_and_each_call_is_named_once() {
        // BPF_MAXINSNS, of linux/bpf_common.h.
        assert!(program(Forbidden::Kill).unwrap().len() < 4096);
        let mut calls = CALLS.to_vec();
        calls.sort_unstable();
        calls.dedup();
        assert_eq!(calls.len(), CALLS.len());
    }
}
