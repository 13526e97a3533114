//! Consoles of a guest under virsh.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::os::unix::fs::FileTypeExt as _;

use common::have_kvm;
use common::livepointd::Daemon;
use common::terminal::Terminal;

#[test]
fn a_console_types_to_the_guest_and_shows_its_answer() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    daemon.define_echo("d");
    daemon.ok(&["start", "d"]);
    let mut console = Terminal::open(&daemon, &["console", "d"]);
    console.attach();
    console.type_in("hello guest\r");
    console.wait("echo: hello guest");
    let busy = Terminal::open(&daemon, &["console", "d"]);
    let mut busy = busy;
    busy.wait("Active console session exists");
    let mut second = Terminal::open(&daemon, &["console", "d", "--force"]);
    second.attach();
    second.type_in("poweroff\r");
    second.wait("powering off");
    daemon.wait_state("d", "shut off");
}

#[test]
fn virtio_consoles_are_found_by_name_and_the_first_is_the_one_that_is_meant() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let socket = daemon.path("second.sock");
    let devices = format!(
        "<console type='pty'><target type='virtio'/></console>\
         <console type='unix'><source mode='bind' path='{}'/><target type='virtio'/>\
         <alias name='ua-second'/></console>\
         <console type='null'><target type='virtio'/></console>",
        socket.display()
    );
    let file = daemon.domain("d", "virtio", 64, &devices);
    daemon.ok(&["define", file.to_str().unwrap()]);
    daemon.ok(&["start", "d"]);
    let pty = daemon.ok(&["ttyconsole", "d"]);
    assert!(pty.starts_with("/dev/pts/"), "{pty}");
    let xml = daemon.ok(&["dumpxml", "d"]);
    let first = format!(
        "    <console type='pty' tty='{pty}'>\n      <source path='{pty}'/>\n      \
         <target type='virtio' port='0'/>\n      <alias name='console0'/>\n"
    );
    for expected in [
        &first,
        "<alias name='ua-second'/>",
        "<alias name='console2'/>",
    ] {
        assert!(xml.contains(expected), "{expected}:\n{xml}");
    }
    let metadata = std::fs::metadata(&socket).unwrap();
    assert!(metadata.file_type().is_socket());
    for (name, text) in [
        (None, "one"),
        (Some("console0"), "two"),
        (Some("ua-second"), "three"),
    ] {
        let mut arguments = vec!["console", "d"];
        arguments.extend(name.iter().flat_map(|name| ["--devname", name]));
        let mut console = Terminal::open(&daemon, &arguments);
        console.attach();
        console.type_in(&format!("{text}\r"));
        console.wait(text);
    }
    for (name, why) in [
        ("console2", "neither a terminal nor a socket"),
        ("console7", "cannot find console device 'console7'"),
        ("serial0", "cannot find console device 'serial0'"),
    ] {
        let mut console = Terminal::open(&daemon, &["console", "d", "--devname", name]);
        console.wait(why);
    }
    daemon.ok(&["destroy", "d"]);
}
