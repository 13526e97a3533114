//! Sections 1 and 8: the commands.

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::{Edition, Page};

/// Paths and what they are for.
type Facts = &'static [(&'static str, &'static str)];

const STATUS: Facts = &[
    ("0", "Done."),
    ("1", "It failed; the reason is on standard error."),
    ("2", "The arguments are wrong."),
];

const ENVIRONMENT: Facts = &[
    ("LIVEPOINT_RUNTIME_DIR", "As --runtime-dir."),
    (
        "LIVEPOINT_LOG",
        "What to say on standard error, by part of the program, as in checkpoint=debug.",
    ),
];

const COMMAND_FILES: Facts = &[
    (
        "/run/livepoint",
        "Sockets and locks of running domains; of a user, $XDG_RUNTIME_DIR/livepoint.",
    ),
    (
        "/var/lib/livepoint/checkpoints",
        "Images, where no other place is given.",
    ),
];

const DAEMON_FILES: Facts = &[
    ("/etc/livepoint", "Definitions of domains."),
    (
        "/var/lib/livepoint",
        "Snapshots, managed saves and logs of domains.",
    ),
    ("/run/livepoint", "Sockets and locks of running domains."),
    (
        "/run/libvirt/virtlivepointd-sock",
        "Where libvirt's clients connect to.",
    ),
];

const COMMAND_OTHERS: &[&str] = &["livepointd(8)", "livepoint(3)"];
const DAEMON_OTHERS: &[&str] = &["livepoint(1)", "virsh(1)", "systemd.socket(5)"];

pub(crate) fn pages(edition: &Edition) -> anyhow::Result<Vec<Page>> {
    let mut pages = Vec::new();
    let mut command = livepoint::cli::command().disable_help_subcommand(true);
    command.build();
    for subcommand in command.get_subcommands().filter(|s| !s.is_hide_set()) {
        let mut page = Vec::new();
        render(subcommand, '1', edition, &mut page)?;
        section(&mut page, "EXIT STATUS", STATUS)?;
        see_also(&mut page, &["livepoint(1)"])?;
        let name = subcommand.get_display_name();
        let name = name.unwrap_or_else(|| subcommand.get_name());
        pages.push(finish(name, '1', page)?);
    }
    for (command, number, files, others) in [
        (command, '1', COMMAND_FILES, COMMAND_OTHERS),
        (
            livepoint::daemon::command(),
            '8',
            DAEMON_FILES,
            DAEMON_OTHERS,
        ),
    ] {
        let mut page = Vec::new();
        render(&command, number, edition, &mut page)?;
        section(&mut page, "EXIT STATUS", STATUS)?;
        section(&mut page, "ENVIRONMENT", ENVIRONMENT)?;
        section(&mut page, "FILES", files)?;
        see_also(&mut page, others)?;
        pages.push(finish(command.get_name(), number, page)?);
    }
    Ok(pages)
}

/// Writes what the argument parser knows.
fn render(
    command: &Command,
    section: char,
    edition: &Edition,
    page: &mut Vec<u8>,
) -> std::io::Result<()> {
    let man = Man::new(command.clone())
        .section(section)
        .date(&edition.date)
        .source(&edition.source)
        .manual("livepoint");
    man.render_title(page)?;
    man.render_name_section(page)?;
    man.render_synopsis_section(page)?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(page)?;
    }
    Ok(())
}

fn section(page: &mut Vec<u8>, heading: &str, facts: Facts) -> std::io::Result<()> {
    let mut roff = Roff::new();
    roff.control("SH", [heading]);
    for (what, why) in facts {
        roff.control("TP", []);
        roff.text([bold(*what)]);
        roff.text([roman(*why)]);
    }
    roff.to_writer(page)
}

fn see_also(page: &mut Vec<u8>, others: &[&str]) -> std::io::Result<()> {
    let mut roff = Roff::new();
    roff.control("SH", ["SEE ALSO"]);
    roff.text([roman(others.join(", "))]);
    roff.to_writer(page)
}

fn finish(name: &str, section: char, page: Vec<u8>) -> anyhow::Result<Page> {
    Ok(Page {
        name: name.to_owned(),
        section,
        // An empty line is a request of its own; breaks around it are a mistake to mandoc.
        text: String::from_utf8(page)?.replace("\n.br\n\n.br\n", "\n.sp\n"),
    })
}
