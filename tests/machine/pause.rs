//! Pausing and resuming machines that run.

use std::thread;
use std::time::Duration;

use livepoint::guest::{Guest, GuestError};
use livepoint::machine::{Machine, MachineState};

use crate::common::have_kvm;
use crate::guest_code::{PATIENCE, assemble, spec, start};
use crate::save_restore::{counters, live_kernel, wait_for_ticks};

#[test]
fn nothing_moves_between_pause_and_resume() {
    if !have_kvm() {
        return;
    }
    let (spec, _console) = spec(live_kernel());
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    let region = machine.regions()[0].clone();
    wait_for_ticks(&region, 3);
    let mut kicks = Vec::new();
    let mut last = 0;
    for _ in 0..200 {
        let timing = machine.pause().unwrap();
        kicks.push(timing.kick + timing.quiesce);
        let before = counters(&region);
        thread::sleep(Duration::from_micros(300));
        assert_eq!(counters(&region), before);
        assert!(before[1] > last, "it ran in between");
        last = before[1];
        machine.resume();
        while counters(&region)[1] == last {
            thread::yield_now();
        }
    }
    kicks.sort_unstable();
    println!(
        "pause of a compute loop: p50 {:?}, p90 {:?}, max {:?}",
        kicks[100], kicks[180], kicks[199]
    );
    wait_for_ticks(&region, counters(&region)[0] + 10);
}

#[test]
fn every_kind_of_loop_can_be_paused_again_and_again() {
    if !have_kvm() {
        return;
    }
    let loops = [
        ("registers", "1: inc %rax; jmp 1b"),
        ("halted", "sti; 1: hlt; jmp 1b"),
        ("halted for good", "cli; 1: hlt; jmp 1b"),
        ("port out", "mov $0x80, %dx; 1: out %al, %dx; jmp 1b"),
        (
            "port in",
            "mov $0x3fd, %dx; 1: in %dx, %al; cmp $0x60, %al; je 1b; ud2",
        ),
        (
            "MMIO",
            "mov $0xd0000000, %edi; 1: mov (%rdi), %rax; cmp $-1, %rax; je 1b; ud2",
        ),
        (
            "MMIO across pages",
            "mov $0xd0000ffc, %edi; 1: mov (%rdi), %rax; cmp $-1, %rax; je 1b; ud2",
        ),
    ];
    for (what, code) in loops {
        let (machine, _console) = start(code);
        for _ in 0..100 {
            machine.pause().unwrap();
            machine.save_state().unwrap();
            machine.resume();
        }
        assert_eq!(machine.state(), MachineState::Running, "{what}");
    }
}

#[test]
fn the_engines_pause_nests_in_the_users() {
    if !have_kvm() {
        return;
    }
    let (spec, _console) = spec(live_kernel());
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    let region = machine.regions()[0].clone();
    wait_for_ticks(&region, 3);
    machine.pause_by_user().unwrap();
    assert!(machine.pause_by_user().is_err());
    let before = counters(&region);
    machine.pause().unwrap();
    machine.pause().unwrap();
    machine.resume();
    machine.resume();
    thread::sleep(Duration::from_millis(5));
    assert_eq!(counters(&region), before);
    assert_eq!(machine.state(), MachineState::Paused);
    machine.pause().unwrap();
    machine.resume_by_user().unwrap();
    thread::sleep(Duration::from_millis(5));
    assert_eq!(counters(&region), before, "the engine's pause is in force");
    machine.resume();
    wait_for_ticks(&region, before[0] + 10);
}

#[test]
fn a_reset_waits_for_the_engine() {
    if !have_kvm() {
        return;
    }
    let (spec, _console) = spec(live_kernel());
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    let region = machine.regions()[0].clone();
    wait_for_ticks(&region, 3);
    thread::scope(|scope| {
        machine.pause().unwrap();
        let before = counters(&region);
        let reset = scope.spawn(|| machine.reset());
        thread::sleep(Duration::from_millis(20));
        assert_eq!(counters(&region), before);
        assert!(!reset.is_finished());
        machine.resume();
        reset.join().unwrap().unwrap();
    });
    wait_for_ticks(&region, 3);
}

#[test]
fn a_machine_that_has_ended_is_not_paused() {
    if !have_kvm() {
        return;
    }
    let (machine, _console) = start("ud2");
    machine.wait(Some(PATIENCE));
    assert!(matches!(machine.pause(), Err(GuestError::State { .. })));
    assert!(machine.check_checkpointable().is_err());
}

#[test]
fn a_power_off_is_never_lost_to_a_pause() {
    if !have_kvm() {
        return;
    }
    // Spins a while, so that the pauses below meet the power-off at many places.
    let code = assemble(
        "mov $3000, %ecx; 1: dec %ecx; jnz 1b
         mov $0x604, %dx; mov $0x2000, %ax; out %ax, %dx; ud2",
    );
    for _ in 0..20 {
        let (spec, _console) = spec(code.clone());
        let machine = Machine::build(spec).unwrap();
        machine.start(false).unwrap();
        while machine.pause().is_ok() {
            machine.resume();
        }
        let state = machine.wait(Some(PATIENCE)).to_string();
        assert!(state.contains("powered off"), "{state}");
    }
}
