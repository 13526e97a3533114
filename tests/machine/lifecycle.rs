//! How machines end and start over.

use std::sync::mpsc;

use livepoint::machine::spec::{EndAction, Source};
use livepoint::machine::{Machine, MachineEvent, MachineState, ShutoffReason};

use crate::common::have_kvm;
use crate::guest_code::{PATIENCE, assemble, spec, start};

const POWER_OFF: &str = "mov $0x604, %dx; mov $0x2000, %ax; out %ax, %dx; 1: jmp 1b";

fn shut_off(reason: ShutoffReason) -> MachineState {
    MachineState::Shutoff { reason }
}

#[test]
fn a_guest_powers_off_by_the_acpi_register() {
    if !have_kvm() {
        return;
    }
    let (machine, _console) = start(POWER_OFF);
    assert_eq!(
        machine.wait(Some(PATIENCE)),
        shut_off(ShutoffReason::PoweredOff)
    );
}

#[test]
fn a_triple_fault_is_a_crash_and_says_where() {
    if !have_kvm() {
        return;
    }
    let (machine, _console) = start("ud2");
    let MachineState::Shutoff {
        reason: ShutoffReason::Crashed(why),
    } = machine.wait(Some(PATIENCE))
    else {
        panic!("{:?}", machine.state());
    };
    assert!(
        why.contains("triple fault") && why.contains("rip="),
        "{why}"
    );
}

#[test]
fn a_crashed_machine_is_kept_where_asked() {
    if !have_kvm() {
        return;
    }
    let (mut spec, _console) = spec(assemble("ud2"));
    spec.lifecycle.on_crash = EndAction::Preserve;
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    assert!(matches!(
        machine.wait(Some(PATIENCE)),
        MachineState::Crashed { .. }
    ));
    machine.destroy();
    assert_eq!(machine.state(), shut_off(ShutoffReason::Destroyed));
}

/// Writes a letter, and resets until a word of memory that a reset clears, and one of the
/// command line that it rewrites, tell how often: a serial input byte ends it.
const RESETS: &str = "
    mov $0x3f8, %dx
    mov $'a', %al
    add marker(%rip), %al       # 0 each time: a reset clears memory
    out %al, %dx
    movb $1, marker(%rip)
    mov $0x3fd, %dx
1:  in %dx, %al
    test $1, %al
    jz 1b
    mov $0x3f8, %dx
    in %dx, %al
    cmp $'q', %al
    je 2f
    mov $0xfe, %al
    out %al, $0x64
3:  jmp 3b
2:  mov $0x604, %dx
    mov $0x2000, %ax
    out %ax, %dx
    jmp 3b
    .balign 8
marker: .byte 0
";

#[test]
fn a_guest_that_resets_itself_starts_over_with_fresh_memory() {
    if !have_kvm() {
        return;
    }
    let (machine, mut console) = start(RESETS);
    let (tell, events) = mpsc::channel();
    machine.listen(Box::new(move |event| tell.send(event.clone()).is_ok()));
    for _ in 0..5 {
        assert_eq!(console.wait_for("a"), "a");
        console.send("r");
    }
    console.wait_for("a");
    machine.reset().unwrap();
    console.wait_for("a");
    console.send("q");
    assert_eq!(
        machine.wait(Some(PATIENCE)),
        shut_off(ShutoffReason::PoweredOff)
    );
    let resets = events.try_iter().filter(|it| *it == MachineEvent::Reset);
    assert_eq!(resets.count(), 6);
}

#[test]
fn a_machine_whose_kernel_is_gone_ends_at_its_reset() {
    if !have_kvm() {
        return;
    }
    for by_guest in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel.elf");
        std::fs::write(&path, assemble(RESETS)).unwrap();
        let (mut spec, mut console) = spec(Vec::new());
        spec.boot.as_mut().unwrap().kernel = Source::Path(path.clone());
        let machine = Machine::build(spec).unwrap();
        machine.start(false).unwrap();
        console.wait_for("a");
        std::fs::remove_file(&path).unwrap();
        if by_guest {
            console.send("r");
        } else {
            machine.reset().unwrap_err();
        }
        let state = machine.wait(Some(PATIENCE)).to_string();
        assert!(state.contains("kernel.elf"), "{state}");
    }
}

#[test]
fn a_reset_ends_the_machine_where_asked() {
    if !have_kvm() {
        return;
    }
    let (mut spec, mut console) = spec(assemble(RESETS));
    spec.lifecycle.on_reboot = EndAction::Destroy;
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    console.wait_for("a");
    console.send("r");
    assert_eq!(machine.wait(Some(PATIENCE)), shut_off(ShutoffReason::Reset));
}

#[test]
fn the_power_button_interrupts_a_guest_that_asked_for_it() {
    if !have_kvm() {
        return;
    }
    // Enables the button, then polls its status: interrupts are another test's.
    let (machine, mut console) = start(
        "
        mov $0x602, %dx; mov $0x100, %ax; out %ax, %dx
        mov $0x3f8, %dx; mov $'e', %al; out %al, %dx
        mov $0x600, %dx
    1:  in %dx, %ax
        test $0x100, %ax
        jz 1b
        mov $0x604, %dx; mov $0x2000, %ax; out %ax, %dx
    2:  jmp 2b",
    );
    console.wait_for("e");
    assert!(machine.shutdown().unwrap());
    assert_eq!(
        machine.wait(Some(PATIENCE)),
        shut_off(ShutoffReason::PoweredOff)
    );
    assert!(machine.shutdown().is_err(), "it has ended");
}

#[test]
fn a_destroyed_machine_ends_paused_or_not_started_or_running() {
    if !have_kvm() {
        return;
    }
    for how in 0..4 {
        let (spec, _console) = spec(assemble("1: jmp 1b"));
        let machine = Machine::build(spec).unwrap();
        match how {
            0 => {}
            1 => machine.start(false).unwrap(),
            2 => machine.start(true).unwrap(),
            _ => {
                machine.start(false).unwrap();
                machine.pause_by_user().unwrap();
            }
        }
        machine.destroy();
        machine.destroy();
        assert_eq!(machine.state(), shut_off(ShutoffReason::Destroyed));
        assert!(machine.start(false).is_err());
    }
}
