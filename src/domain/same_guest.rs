//! Whether a document describes the machine that a guest is in already.

use std::fmt;

use super::disk::Disk;
use super::interface::Interface;
use super::pci::PciDeviceKind;
use super::{DomainConfig, TickPolicy};

/// What another document would change under a guest that is in its machine already. What the host
/// does behind the machine is not of it: where disks, consoles and networks are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct OtherGuest {
    what: String,
    /// What the other document says, and what it would have to say.
    values: Option<(String, String)>,
}

impl fmt::Display for OtherGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = &self.what;
        match &self.values {
            Some((found, wanted)) => {
                write!(f, "Target {what} {found} does not match source {wanted}")
            }
            None => write!(f, "Target {what} does not match source"),
        }
    }
}

/// Something that the guest would notice, in words.
#[derive(Debug, PartialEq)]
struct Fact {
    what: String,
    value: String,
    /// Whether the value is one that people read.
    is_word: bool,
}

impl Fact {
    fn new(what: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            value: value.into(),
            is_word: true,
        }
    }

    fn of(what: &str, value: &impl fmt::Debug) -> Self {
        Self {
            what: what.to_owned(),
            value: format!("{value:?}"),
            is_word: false,
        }
    }
}

impl DomainConfig {
    /// Checks that `other` describes the same domain and, to its guest, the same machine.
    ///
    /// # Errors
    ///
    /// It does not; the error says what differs first.
    pub fn check_same_guest(&self, other: &DomainConfig) -> Result<(), OtherGuest> {
        let (wanted, found) = (self.facts(), other.facts());
        let differing = wanted.iter().zip(&found).find(|(one, two)| one != two);
        let Some((wanted, found)) = differing else {
            return match wanted.get(found.len()).or(found.get(wanted.len())) {
                Some(more) => Err(OtherGuest {
                    what: more.what.clone(),
                    values: None,
                }),
                None => Ok(()),
            };
        };
        let is_same_thing = wanted.what == found.what;
        let values =
            (is_same_thing && wanted.is_word).then(|| (found.value.clone(), wanted.value.clone()));
        Err(OtherGuest {
            what: wanted.what.clone(),
            values,
        })
    }

    /// Returns what a guest would notice if it were another.
    fn facts(&self) -> Vec<Fact> {
        let machine = &self.machine;
        let mut facts = vec![
            Fact::new("domain name", self.name.as_str()),
            Fact::new("domain uuid", self.uuid.to_string()),
            Fact::new(
                "domain memory in KiB",
                machine.memory.size().kib().to_string(),
            ),
            Fact::new("domain vCPU count", machine.vcpus.count().to_string()),
            Fact::of("domain vCPU topology", &machine.vcpus.topology()),
            Fact::of("domain CPU", &machine.cpu),
            Fact::new("timer kvmclock", yes_no(machine.clock.kvmclock)),
            Fact::new(
                "timer pit tickpolicy",
                match machine.clock.pit {
                    TickPolicy::Delay => "delay",
                    TickPolicy::Discard => "discard",
                },
            ),
        ];
        for (index, _) in machine.devices.serial.iter() {
            facts.push(Fact::new("serial port", index.to_string()));
        }
        for (slot, device) in machine.devices.pci.iter() {
            let what = format!("device in PCI slot {:#04x}:", slot.number());
            let value = match &device.kind {
                PciDeviceKind::Disk(disk) => disk_facts(disk),
                PciDeviceKind::Interface(interface) => interface_facts(interface),
                PciDeviceKind::Rng(_) => "rng".to_owned(),
                PciDeviceKind::Console(_) => "console".to_owned(),
                PciDeviceKind::Balloon(balloon) => {
                    let reports = balloon.free_page_reporting.unwrap_or(false);
                    let deflates = balloon.auto_deflate.unwrap_or(false);
                    let (reports, deflates) = (yes_no(reports), yes_no(deflates));
                    format!("memballoon (freePageReporting {reports}, autodeflate {deflates})")
                }
            };
            facts.push(Fact::new(what, value));
        }
        facts
    }
}

fn yes_no(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

fn disk_facts(disk: &Disk) -> String {
    let serial = disk
        .serial
        .as_ref()
        .map_or("none", |serial| serial.as_str());
    let read_only = yes_no(disk.read_only);
    let discards = yes_no(disk.discard.unwrap_or(false));
    let name = disk.target.as_str();
    format!("disk {name} (serial {serial}, readonly {read_only}, discard {discards})")
}

fn interface_facts(interface: &Interface) -> String {
    format!("interface {}", interface.mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "<domain type='kvm'><name>d</name>\
        <uuid>5a8f4bd1-1b6c-4c28-a6f4-3f6cbb1bb5b1</uuid><memory unit='MiB'>64</memory>\
        <vcpu>2</vcpu><os><type>hvm</type><kernel>/k</kernel></os><devices>\
        <disk type='file' device='disk'><source file='/a'/><target dev='vda' bus='virtio'/></disk>\
        <interface type='ethernet'><mac address='52:54:00:00:00:01'/><model type='virtio'/></interface>\
        <serial type='pty'/><memballoon model='none'/></devices></domain>";

    /// Says what a change of the saved document would change for the guest.
    fn change(from: &str, to: &str) -> Result<(), String> {
        assert!(SAVED.contains(from), "{from}");
        let saved = DomainConfig::parse(SAVED).unwrap();
        let other = DomainConfig::parse(&SAVED.replace(from, to)).unwrap();
        let checked = saved.check_same_guest(&other);
        checked.map_err(|error| error.to_string())
    }

    #[test]
    fn what_only_the_host_knows_may_change() {
        change("/a", "/elsewhere").unwrap();
        change("<serial type='pty'/>", "<serial type='null'/>").unwrap();
        change("<kernel>/k</kernel>", "<kernel>/other</kernel>").unwrap();
        change("<vcpu>", "<on_crash>destroy</on_crash><vcpu>").unwrap();
        change("<memory", "<title>t</title><memory").unwrap();
        let bridge = "<interface type='bridge'><source bridge='br0'/>";
        change("<interface type='ethernet'>", bridge).unwrap();
    }

    #[test]
    fn what_the_guest_would_notice_is_named_with_both_values() {
        let refused = |from: &str, to: &str| change(from, to).unwrap_err();
        let said = refused("<name>d<", "<name>e<");
        assert_eq!(said, "Target domain name e does not match source d");
        let said = refused("'MiB'>64<", "'MiB'>128<");
        assert_eq!(
            said,
            "Target domain memory in KiB 131072 does not match source 65536"
        );
        let said = refused("<vcpu>2<", "<vcpu>1<");
        assert_eq!(said, "Target domain vCPU count 1 does not match source 2");
        let said = refused("00:01'", "00:02'");
        assert!(said.contains("slot 0x02: interface 52:54:00:00:00:02 does not"));
        let said = refused("<target dev='vda'", "<readonly/><target dev='vda'");
        assert!(said.contains("readonly yes") && said.contains("readonly no"));
        let said = refused("<serial type='pty'/>", "");
        assert_eq!(said, "Target serial port does not match source");
        let said = refused(
            "<devices>",
            "<cpu mode='host-passthrough'><feature policy='disable' name='avx2'/></cpu><devices>",
        );
        assert_eq!(said, "Target domain CPU does not match source");
        let rng = "<rng model='virtio'><backend model='random'>/dev/random</backend></rng>";
        let said = refused("<memballoon", &format!("{rng}<memballoon"));
        assert!(said.starts_with("Target device in PCI slot 0x03"), "{said}");
    }
}
