//! Serial ports and what is behind them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use livepoint::guest::Guest;
use livepoint::machine::Machine;
use livepoint::machine::spec::{SerialBackend, SerialSpec};

use crate::common::have_kvm;
use crate::guest_code::{PATIENCE, assemble, spec, start};

/// Sends back what it receives, and powers off on a `q`.
const ECHO: &str = "
1:  mov $0x3fd, %dx
    in %dx, %al
    test $1, %al
    jz 1b
    mov $0x3f8, %dx
    in %dx, %al
    cmp $'q', %al
    je 2f
    out %al, %dx
    jmp 1b
2:  mov $0x604, %dx
    mov $0x2000, %ax
    out %ax, %dx
3:  jmp 3b";

/// Writes a line again and again, by string instructions.
const CHATTER: &str = "
1:  mov $0x3f8, %dx
    lea line(%rip), %rsi
    mov $17, %ecx
    rep outsb
    jmp 1b
line: .ascii \"0123456789abcdef\\n\"";

fn with_backend(source: &str, backend: SerialBackend) -> Machine {
    let (mut spec, _console) = spec(assemble(source));
    spec.serials = vec![SerialSpec { port: 0, backend }];
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    machine
}

fn read_until(from: &mut impl Read, text: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    let mut seen = String::new();
    while !seen.contains(text) {
        assert!(Instant::now() < deadline, "{text:?} never came: {seen:?}");
        let mut buffer = [0; 256];
        let bytes = from.read(&mut buffer).unwrap();
        seen.push_str(&String::from_utf8_lossy(&buffer[..bytes]));
    }
    seen
}

#[test]
fn string_output_is_whole_and_in_order_in_a_file() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.log");
    std::fs::write(&path, "old").unwrap();
    let code = "
        mov $0x3f8, %dx
        lea line(%rip), %rsi
        mov $3000, %ecx
        rep outsb
        mov $0x604, %dx
        mov $0x2000, %ax
        out %ax, %dx
    1:  jmp 1b
    line: .rept 300
        .ascii \"0123456789\"
        .endr";
    for append in [false, true] {
        let backend = SerialBackend::File {
            path: path.clone(),
            append,
        };
        let machine = with_backend(code, backend);
        machine.wait(Some(PATIENCE));
        drop(machine);
        let expected = "0123456789".repeat(if append { 600 } else { 300 });
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
    }
}

#[test]
fn input_waits_for_the_guest_and_none_is_lost() {
    if !have_kvm() {
        return;
    }
    let (machine, mut console) = start(ECHO);
    let text: String = ('A'..='Z').cycle().take(2000).collect();
    for part in text.as_bytes().chunks(500) {
        console.send(std::str::from_utf8(part).unwrap());
    }
    console.send("!");
    assert_eq!(console.wait_for("!"), format!("{text}!"));
    console.send("q");
    machine.wait(Some(PATIENCE));
}

#[test]
fn input_that_comes_in_a_pause_comes_after_it() {
    if !have_kvm() {
        return;
    }
    let (machine, mut console) = start(ECHO);
    console.send("a");
    console.wait_for("a");
    machine.pause().unwrap();
    let before = machine.save_state().unwrap();
    console.send("b!");
    thread::sleep(Duration::from_millis(30));
    let serial = |sections: &[livepoint::state::StateSection]| {
        sections.iter().find(|it| it.kind == "serial").cloned()
    };
    let after = machine.save_state().unwrap();
    assert_eq!(serial(&before), serial(&after));
    machine.resume();
    console.wait_for("b!");
}

#[test]
fn a_reader_that_does_not_read_holds_up_nothing() {
    if !have_kvm() {
        return;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let backend = SerialBackend::Stream(std::sync::Arc::new(theirs.into()));
    let machine = with_backend(CHATTER, backend);
    let deadline = Instant::now() + PATIENCE;
    while machine.consoles()[0].lost_bytes == 0 {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(10));
    }
    for _ in 0..20 {
        let timing = machine.pause().unwrap();
        assert!(timing.kick < PATIENCE);
        machine.resume();
    }
    // What was not lost is whole.
    let mut reader = ours;
    assert!(read_until(&mut reader, "f\n").starts_with("0123456789abcdef\n"));
}

#[test]
fn a_terminal_is_raw_has_its_mode_and_discards_what_nobody_reads() {
    if !have_kvm() {
        return;
    }
    let machine = with_backend(ECHO, SerialBackend::Pty { mode: 0o620 });
    let path = machine.consoles()[0].path.clone().unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o620);
    for _ in 0..3 {
        let mut terminal = File::options().read(true).write(true).open(&path).unwrap();
        terminal.write_all(b"line\r\n!").unwrap();
        assert_eq!(read_until(&mut terminal, "!"), "line\r\n!");
    }
    drop(machine);
    let machine = with_backend(CHATTER, SerialBackend::Pty { mode: 0o600 });
    thread::sleep(Duration::from_millis(50));
    assert_eq!(machine.consoles()[0].lost_bytes, 0, "discarded, not queued");
    let path = machine.consoles()[0].path.clone().unwrap();
    let mut terminal = File::open(&path).unwrap();
    read_until(&mut terminal, "0123456789abcdef\n");
}

#[test]
fn a_socket_takes_one_client_after_the_other() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    for _ in 0..2 {
        let backend = SerialBackend::UnixListen { path: path.clone() };
        let machine = with_backend(ECHO, backend);
        for _ in 0..3 {
            let mut client = UnixStream::connect(&path).unwrap();
            client.write_all(b"hello!").unwrap();
            assert_eq!(read_until(&mut client, "!"), "hello!");
        }
        drop(machine);
        assert!(!path.exists(), "the socket goes with its machine");
        // As a process that was killed leaves it.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    }
}

#[test]
fn a_socket_in_use_is_refused_by_name() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let (mut spec, _console) = spec(assemble(ECHO));
    spec.serials[0].backend = SerialBackend::UnixListen { path: path.clone() };
    let error = Machine::build(spec).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("console.sock"), "{source}");
    assert!(path.exists(), "another's socket stays");
}

#[test]
fn received_bytes_are_in_the_saved_state() {
    if !have_kvm() {
        return;
    }
    let (machine, mut console) = start("1: jmp 1b");
    console.send("unread");
    let deadline = Instant::now() + PATIENCE;
    loop {
        machine.pause().unwrap();
        let mut state = livepoint::state::StateSet::new(machine.save_state().unwrap()).unwrap();
        machine.resume();
        let serial: livepoint::state::device::SerialV1 = state.take(0).unwrap();
        if serial.received == b"unread" {
            break;
        }
        assert!(Instant::now() < deadline, "{serial:?}");
    }
}

#[test]
fn a_terminal_keeps_the_last_output_for_a_slow_reader() {
    if !have_kvm() {
        return;
    }
    for _ in 0..5 {
        let machine = with_backend(ECHO, SerialBackend::Pty { mode: 0o600 });
        let path = machine.consoles()[0].path.clone().unwrap();
        let mut terminal = File::options().read(true).write(true).open(&path).unwrap();
        terminal.write_all(b"last!").unwrap();
        // The guest has answered; what it said is in the terminal, and nobody has read it.
        let deadline = Instant::now() + PATIENCE;
        while rustix::io::ioctl_fionread(&terminal).unwrap() < 5 {
            assert!(Instant::now() < deadline, "the guest hangs");
            thread::sleep(Duration::from_millis(1));
        }
        let ended = thread::spawn(move || machine.destroy());
        thread::sleep(Duration::from_millis(100));
        assert_eq!(read_until(&mut terminal, "!"), "last!");
        ended.join().unwrap();
    }
}
