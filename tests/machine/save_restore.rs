//! A saved machine goes on in a new one.

use std::thread;
use std::time::{Duration, Instant};

use livepoint::guest::{Guest, MemoryRegion};
use livepoint::machine::{
    Machine, MachineError, MachineState, MemoryFailure, MemoryRewind, Reuse, ShutoffReason,
};
use livepoint::state::vcpu::VcpuV1;
use livepoint::state::{StateSection, StateSet};

use crate::common::have_kvm;
use crate::guest_code::{PATIENCE, assemble, spec};

/// Where `live_state.S` counts: ticks, loops, bad.
const COUNTERS: usize = 0x10_8000;

pub fn counters(region: &MemoryRegion) -> [u64; 3] {
    let mut bytes = [0; 24];
    region.mapping.copy_out(COUNTERS, &mut bytes);
    [0, 8, 16].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()))
}

/// Waits until the guest has ticked `ticks` times, and finds its registers right.
pub fn wait_for_ticks(region: &MemoryRegion, ticks: u64) {
    let deadline = Instant::now() + PATIENCE;
    while counters(region)[0] < ticks {
        assert!(Instant::now() < deadline, "{:?}", counters(region));
        thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(counters(region)[2], 0, "registers changed");
}

pub fn live_kernel() -> Vec<u8> {
    assemble(include_str!("live_state.S"))
}

/// A machine's memory and state.
struct Saved {
    memory: Vec<u8>,
    sections: Vec<StateSection>,
}

fn save(machine: &Machine) -> Saved {
    machine.pause().unwrap();
    let region = &machine.regions()[0];
    let mut memory = vec![0; region.mapping.len()];
    region.mapping.copy_out(0, &mut memory);
    let sections = machine.save_state().unwrap();
    machine.resume();
    Saved { memory, sections }
}

fn restore(saved: &Saved, vcpus: u32) -> Machine {
    let (mut spec, _console) = spec(live_kernel());
    spec.cpu.vcpu_count = vcpus;
    let unfilled = Machine::build_for_restore(spec).unwrap();
    unfilled.regions()[0].mapping.copy_in(0, &saved.memory);
    let state = StateSet::new(saved.sections.clone()).unwrap();
    unfilled.finish(state).unwrap()
}

fn run_until_live(vcpus: u32) -> (Saved, [u64; 3]) {
    let (mut spec, _console) = spec(live_kernel());
    spec.cpu.vcpu_count = vcpus;
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    wait_for_ticks(&machine.regions()[0], 20);
    let saved = save(&machine);
    let before = counters(&machine.regions()[0]);
    wait_for_ticks(&machine.regions()[0], before[0] + 20);
    (saved, before)
}

#[test]
fn timer_and_vector_registers_go_on_in_a_new_machine() {
    if !have_kvm() {
        return;
    }
    let (saved, _) = run_until_live(1);
    // A chain: what was restored is saved and restored again.
    let machine = restore(&saved, 1);
    let [ticks, loops, _] = counters(&machine.regions()[0]);
    assert!(ticks >= 20);
    machine.start(false).unwrap();
    wait_for_ticks(&machine.regions()[0], ticks + 50);
    assert!(counters(&machine.regions()[0])[1] > loops);
    let again = restore(&save(&machine), 1);
    let [ticks, ..] = counters(&again.regions()[0]);
    again.start(true).unwrap();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(counters(&again.regions()[0])[0], ticks, "started paused");
    again.resume_by_user().unwrap();
    wait_for_ticks(&again.regions()[0], ticks + 50);
}

/// Memory from a copy, or a failure in one of the two steps.
struct FromCopy<'a> {
    region: &'a MemoryRegion,
    memory: &'a [u8],
    reuse: Reuse,
    fails_in_step: usize,
}

impl MemoryRewind for FromCopy<'_> {
    fn prepare(&mut self) -> Result<Reuse, MemoryFailure> {
        if self.fails_in_step == 1 {
            return Err("not today".into());
        }
        Ok(self.reuse)
    }

    fn put_back(&mut self) -> Result<(), MemoryFailure> {
        if self.fails_in_step == 2 {
            return Err("half of it is gone".into());
        }
        if self.reuse == Reuse::Nothing {
            let mut bytes = [1; 64];
            self.region.mapping.copy_out(COUNTERS, &mut bytes);
            assert_eq!(bytes, [0; 64], "memory is discarded first");
        }
        self.region.mapping.copy_in(0, self.memory);
        Ok(())
    }
}

#[test]
fn timer_and_vector_registers_go_on_when_a_machine_is_put_back() {
    if !have_kvm() {
        return;
    }
    let (spec, _console) = spec(live_kernel());
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    let region = machine.regions()[0].clone();
    wait_for_ticks(&region, 20);
    let saved = save(&machine);
    let rewind = |reuse, fails_in_step| {
        let mut memory = FromCopy {
            region: &region,
            memory: &saved.memory,
            reuse,
            fails_in_step,
        };
        let state = StateSet::new(saved.sections.clone()).unwrap();
        machine.rewind(state, &mut memory)
    };
    for turn in 0..10 {
        let [ticks, ..] = counters(&region);
        wait_for_ticks(&region, ticks + 15);
        let paused = turn % 2 == 0;
        if paused {
            machine.pause_by_user().unwrap();
        }
        rewind([Reuse::Rest, Reuse::Nothing][turn % 2], 0).unwrap();
        if paused {
            assert_eq!(machine.state(), MachineState::Paused);
            thread::sleep(Duration::from_millis(5));
            let mut there = [0; 24];
            region.mapping.copy_out(COUNTERS, &mut there);
            assert_eq!(there, saved.memory[COUNTERS..COUNTERS + 24], "it waits");
            machine.resume_by_user().unwrap();
        }
    }
    let [ticks, ..] = counters(&region);
    wait_for_ticks(&region, ticks + 20);
    // What fails before anything has changed changes nothing.
    let error = rewind(Reuse::Nothing, 1).unwrap_err();
    assert!(matches!(error, MachineError::Rewind { .. }), "{error}");
    let [ticks, ..] = counters(&region);
    wait_for_ticks(&region, ticks + 20);
    let mut other = saved.sections.clone();
    other.retain(|section| section.kind != "pci");
    let mut memory = FromCopy {
        region: &region,
        memory: &[],
        reuse: Reuse::Rest,
        fails_in_step: 2,
    };
    let refused = machine.rewind(StateSet::new(other).unwrap(), &mut memory);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("pci.0"), "{refused}");
    let [ticks, ..] = counters(&region);
    wait_for_ticks(&region, ticks + 20);
    // Memory that is nobody's runs no more.
    rewind(Reuse::Rest, 2).unwrap_err();
    let MachineState::Shutoff { reason } = machine.state() else {
        panic!("{:?}", machine.state());
    };
    assert!(
        matches!(&reason, ShutoffReason::Failed(why) if why.contains("half of it is gone")),
        "{reason}"
    );
    assert!(matches!(
        rewind(Reuse::Rest, 0),
        Err(MachineError::WrongState(_))
    ));
}

#[test]
fn what_is_restored_reads_back_the_same() {
    if !have_kvm() {
        return;
    }
    let (saved, _) = run_until_live(2);
    let restored = save(&restore(&saved, 2));
    let mut before = StateSet::new(saved.sections.clone()).unwrap();
    let mut after = StateSet::new(restored.sections).unwrap();
    for vcpu in 0..2 {
        let mut before: VcpuV1 = before.take(vcpu).unwrap();
        let mut after: VcpuV1 = after.take(vcpu).unwrap();
        // Time goes on, and a deadline that has passed meanwhile reads as none.
        after.tsc = before.tsc;
        for state in [&mut before, &mut after] {
            state.msrs.retain(|msr| msr.index != 0x6e0);
            // The timer's interrupt may have become pending.
            state.lapic.0.regs[0x200..0x280].fill(0);
        }
        assert_eq!(before.msrs, after.msrs, "vCPU {vcpu}");
        assert_eq!(before, after, "vCPU {vcpu}");
    }
}

#[test]
fn a_state_with_a_section_missing_or_too_many_is_refused_by_name() {
    if !have_kvm() {
        return;
    }
    let (saved, _) = run_until_live(1);
    let finish = |sections: Vec<StateSection>| {
        let (spec, _console) = spec(live_kernel());
        let unfilled = Machine::build_for_restore(spec).unwrap();
        unfilled.finish(StateSet::new(sections).unwrap())
    };
    for at in 0..saved.sections.len() {
        let mut fewer = saved.sections.clone();
        let left_out = fewer.remove(at);
        let error = finish(fewer).unwrap_err();
        assert!(matches!(error, MachineError::State(_)), "{error:?}");
        assert!(error.to_string().contains(&left_out.kind), "{error}");
    }
    let mut more = saved.sections.clone();
    more.push(StateSection {
        kind: "gpu".to_owned(),
        instance: 0,
        version: 1,
        payload: Vec::new(),
    });
    let error = finish(more).unwrap_err();
    assert!(error.to_string().contains("gpu.0"), "{error}");
}

#[test]
fn the_state_of_another_machine_is_refused() {
    if !have_kvm() {
        return;
    }
    let (saved, _) = run_until_live(1);
    let (mut spec, _console) = spec(live_kernel());
    spec.memory.bytes *= 2;
    let unfilled = Machine::build_for_restore(spec).unwrap();
    let error = unfilled
        .finish(StateSet::new(saved.sections).unwrap())
        .unwrap_err();
    assert!(
        matches!(error, MachineError::OtherMachine { .. }),
        "{error}"
    );
}

#[test]
fn a_restored_machine_starts_over_on_a_reset() {
    if !have_kvm() {
        return;
    }
    let (saved, _) = run_until_live(1);
    let machine = restore(&saved, 1);
    machine.start(false).unwrap();
    wait_for_ticks(
        &machine.regions()[0],
        counters(&machine.regions()[0])[0] + 10,
    );
    for _ in 0..3 {
        machine.reset().unwrap();
        wait_for_ticks(&machine.regions()[0], 10);
    }
}

#[test]
fn a_state_with_flipped_bytes_never_panics() {
    if !have_kvm() {
        return;
    }
    let (saved, _) = run_until_live(1);
    let mut seed = 1_u64;
    let mut random = move |below: usize| {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        usize::try_from(seed >> 33).unwrap() % below
    };
    for _ in 0..40 {
        let mut sections = saved.sections.clone();
        let count = sections.len();
        let payload = &mut sections[random(count)].payload;
        for _ in 0..1 + random(4) {
            let at = random(payload.len());
            payload[at] ^= 1 << random(8);
        }
        let (spec, _console) = spec(live_kernel());
        let unfilled = Machine::build_for_restore(spec).unwrap();
        // Refused, or a machine that may crash: both are fine.
        if let Ok(machine) = unfilled.finish(StateSet::new(sections).unwrap()) {
            machine.start(false).unwrap();
            thread::sleep(Duration::from_millis(5));
        }
    }
}
