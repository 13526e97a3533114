//! The table of [`super::rules`]: devices.

use super::rules::Rule;

const NOT_YET: &str = "not supported yet; remove it: \
    a machine without it is not the one described";
const NO_INPUT: &str = "input devices are not supported yet";
const NO_DISPLAY: &str = "the machine has no display; use a serial console";
const NO_BUS: &str = "a controller of this type would be a device of the machine: \
    not supported yet";
const ONLY_UART: &str = "serial ports are 16550 UARTs on the ISA bus";
const NO_CHARACTER_TYPE: &str = "this kind of character device is not supported yet";
const NO_LOG: &str = "a second output is not supported yet; use type='file'";
const MIRROR: &str = "one of target type serial is serial port 0 under another name, and makes \
    that port where there is none; those of target type virtio are devices of their own";
const PLACE: &str = "of a virtio console, which is on PCI; a serial port's own is used";

pub(super) const DEVICES: &[Rule] = &[
    Rule::honoured("domain/devices", ""),
    Rule::accepted("domain/devices/emulator", "this program is the emulator").text(),
    Rule::accepted(
        "domain/devices/controller[pci]",
        "the bus that the machine has anyway",
    )
    .needs(&["model"])
    .many(),
    Rule::accepted("domain/devices/controller[pci]@index", ""),
    Rule::accepted("domain/devices/controller[pci]@model", NO_BUS).only(&["pci-root", "pcie-root"]),
    Rule::accepted("domain/devices/controller[pci]/alias", ""),
    Rule::accepted("domain/devices/controller[pci]/alias@name", ""),
    Rule::accepted("domain/devices/controller[usb]", "no USB")
        .needs(&["model"])
        .many(),
    Rule::accepted("domain/devices/controller[usb]@index", ""),
    Rule::accepted("domain/devices/controller[usb]@model", NO_BUS).only(&["none"]),
    Rule::accepted("domain/devices/controller[usb]/alias", ""),
    Rule::accepted("domain/devices/controller[usb]/alias@name", ""),
    Rule::accepted(
        "domain/devices/controller[virtio-serial]",
        "each virtio console is a device of its own",
    )
    .many()
    .dropped()
    .subtree(),
    Rule::refused("domain/devices/controller[ccid]", NO_BUS),
    Rule::refused("domain/devices/controller[fdc]", NO_BUS),
    Rule::refused("domain/devices/controller[ide]", NO_BUS),
    Rule::refused("domain/devices/controller[isa]", NO_BUS),
    Rule::refused("domain/devices/controller[nvme]", NO_BUS),
    Rule::refused("domain/devices/controller[sata]", NO_BUS),
    Rule::refused("domain/devices/controller[scsi]", NO_BUS),
    Rule::refused("domain/devices/controller[xenbus]", NO_BUS),
];

/// What follows the devices on PCI.
pub(super) const REST: &[Rule] = &[
    // Serial ports.
    Rule::honoured("domain/devices/serial", "at most 2: COM1 and COM2")
        .needs(&["type"])
        .many(),
    Rule::honoured("domain/devices/serial@type", NO_CHARACTER_TYPE)
        .only(&["pty", "unix", "file", "null", "stdio"]),
    Rule::honoured("domain/devices/serial/source", "for types unix and file"),
    Rule::honoured(
        "domain/devices/serial/source@path",
        "an absolute path; of a pty it belongs to a running machine and is not kept",
    ),
    Rule::honoured(
        "domain/devices/serial/source@mode",
        "type unix: `connect` where there is none, as in libvirt",
    )
    .only(&["bind", "connect"]),
    Rule::honoured("domain/devices/serial/source@append", "type file").only(&["on", "off"]),
    Rule::refused(
        "domain/devices/serial/source/reconnect",
        "not supported yet",
    ),
    Rule::refused("domain/devices/serial/source/seclabel", "not supported"),
    Rule::refused("domain/devices/serial/protocol", "belongs to type tcp"),
    Rule::refused("domain/devices/serial/log", NO_LOG),
    Rule::honoured("domain/devices/serial/target", ""),
    Rule::honoured("domain/devices/serial/target@type", ONLY_UART).only(&["isa-serial"]),
    Rule::honoured(
        "domain/devices/serial/target@port",
        "0 or 1; the lowest free one where there is none",
    ),
    Rule::honoured("domain/devices/serial/target/model", ""),
    Rule::honoured("domain/devices/serial/target/model@name", ONLY_UART).only(&["isa-serial"]),
    Rule::honoured("domain/devices/serial/alias", "").needs(&["name"]),
    Rule::honoured(
        "domain/devices/serial/alias@name",
        "kept where it starts with `ua-`; other names are given anew at every start",
    ),
    Rule::accepted(
        "domain/devices/serial/address",
        "must be the port's standard address; not kept",
    )
    .needs(&["type"])
    .dropped(),
    Rule::accepted("domain/devices/serial/address@type", ONLY_UART)
        .only(&["isa"])
        .dropped(),
    Rule::accepted("domain/devices/serial/address@iobase", "0x3f8 or 0x2f8").dropped(),
    Rule::accepted("domain/devices/serial/address@irq", "4 or 3").dropped(),
    // Consoles.
    Rule::honoured("domain/devices/console", MIRROR)
        .needs(&["type"])
        .many(),
    Rule::honoured("domain/devices/console@type", NO_CHARACTER_TYPE)
        .only(&["pty", "unix", "file", "null", "stdio"]),
    Rule::accepted(
        "domain/devices/console@tty",
        "belongs to a running machine; not kept",
    )
    .dropped(),
    Rule::honoured("domain/devices/console/source", "as for <serial>"),
    Rule::honoured("domain/devices/console/source@path", "as for <serial>"),
    Rule::honoured("domain/devices/console/source@mode", "as for <serial>")
        .only(&["bind", "connect"]),
    Rule::honoured("domain/devices/console/source@append", "as for <serial>").only(&["on", "off"]),
    Rule::refused(
        "domain/devices/console/source/reconnect",
        "not supported yet",
    ),
    Rule::refused("domain/devices/console/source/seclabel", "not supported"),
    Rule::refused("domain/devices/console/protocol", "belongs to type tcp"),
    Rule::refused("domain/devices/console/log", NO_LOG),
    Rule::honoured("domain/devices/console/target", ""),
    Rule::honoured(
        "domain/devices/console/target@type",
        "other consoles are not supported yet",
    )
    .only(&["serial", "virtio"]),
    Rule::honoured(
        "domain/devices/console/target@port",
        "0 for the serial console; of a virtio console not kept",
    ),
    Rule::honoured(
        "domain/devices/console/alias",
        "of a virtio console; else the port's is used",
    )
    .needs(&["name"]),
    Rule::honoured(
        "domain/devices/console/alias@name",
        "kept where it starts with `ua-`; other names are given anew at every start",
    ),
    Rule::honoured("domain/devices/console/address", PLACE).needs(&["type"]),
    Rule::honoured(
        "domain/devices/console/address@type",
        "virtio-serial says nothing: each virtio console is a device of its own",
    )
    .only(&["isa", "pci", "virtio-serial"]),
    Rule::honoured("domain/devices/console/address@domain", PLACE),
    Rule::honoured("domain/devices/console/address@bus", PLACE),
    Rule::honoured("domain/devices/console/address@slot", PLACE),
    Rule::honoured("domain/devices/console/address@function", PLACE),
    Rule::accepted("domain/devices/console/address@multifunction", PLACE)
        .only(&["off"])
        .dropped(),
    Rule::accepted("domain/devices/console/address@controller", "").dropped(),
    Rule::accepted("domain/devices/console/address@port", "").dropped(),
    Rule::accepted("domain/devices/console/address@iobase", "").dropped(),
    Rule::accepted("domain/devices/console/address@irq", "").dropped(),
    // What libvirt writes into every x86 document.
    Rule::accepted(
        "domain/devices/input",
        "libvirt writes a PS/2 mouse and keyboard into every x86 document; \
         the machine has neither",
    )
    .needs(&["type", "bus"])
    .many(),
    Rule::accepted("domain/devices/input@type", NO_INPUT).only(&["mouse", "keyboard"]),
    Rule::accepted("domain/devices/input@bus", NO_INPUT).only(&["ps2"]),
    Rule::accepted("domain/devices/input/alias", ""),
    Rule::accepted("domain/devices/input/alias@name", ""),
    Rule::accepted("domain/devices/audio", "no sound")
        .needs(&["type"])
        .many(),
    Rule::accepted("domain/devices/audio@id", ""),
    Rule::accepted("domain/devices/audio@type", "sound is not supported yet").only(&["none"]),
    // Devices to come.
    Rule::refused("domain/devices/channel", NOT_YET),
    Rule::refused("domain/devices/parallel", NOT_YET),
    Rule::refused("domain/devices/filesystem", NOT_YET),
    Rule::refused("domain/devices/watchdog", NOT_YET),
    Rule::refused("domain/devices/panic", NOT_YET),
    Rule::refused("domain/devices/vsock", NOT_YET),
    Rule::refused("domain/devices/tpm", NOT_YET),
    Rule::refused("domain/devices/iommu", NOT_YET),
    Rule::refused("domain/devices/memory", NOT_YET),
    Rule::refused("domain/devices/nvram", NOT_YET),
    Rule::refused("domain/devices/crypto", NOT_YET),
    Rule::refused("domain/devices/pstore", NOT_YET),
    Rule::refused("domain/devices/hub", NOT_YET),
    Rule::refused("domain/devices/lease", NOT_YET),
    Rule::refused("domain/devices/smartcard", NOT_YET),
    Rule::refused("domain/devices/redirdev", NOT_YET),
    Rule::refused("domain/devices/redirfilter", NOT_YET),
    Rule::refused("domain/devices/sound", NOT_YET),
    Rule::refused("domain/devices/graphics", NO_DISPLAY),
    Rule::refused("domain/devices/video", NO_DISPLAY),
    Rule::refused(
        "domain/devices/hostdev",
        "the memory that a passed-through device writes cannot be tracked",
    ),
    Rule::refused(
        "domain/devices/shmem",
        "memory that other processes write cannot be checkpointed",
    ),
];
