//! The table of [`super::rules`]: devices on PCI.

use super::rules::Rule;

const ONLY_PCI: &str = "virtio devices are on PCI";
const ONLY_BUS_0: &str = "there is one bus, and each device has a slot of its own";
const SLOT: &str = "0x01 to 0x1f; the lowest free one where there is none. \
    The canonical form has it: a restored guest finds its devices where they were";
const ALIAS: &str = "kept where it starts with `ua-`; other names are given anew at every start";
const OWN_THREAD: &str = "a disk's I/O is on a thread of its own, whatever this says";
const NOT_TUNED: &str = "not supported yet; remove it";

/// The rows of a device's name and place.
macro_rules! placed {
    ($path:literal) => {
        &[
            Rule::honoured(concat!($path, "/alias"), "").needs(&["name"]),
            Rule::honoured(concat!($path, "/alias@name"), ALIAS),
            Rule::honoured(concat!($path, "/address"), "").needs(&["type"]),
            Rule::honoured(concat!($path, "/address@type"), ONLY_PCI).only(&["pci"]),
            Rule::honoured(concat!($path, "/address@domain"), ONLY_BUS_0),
            Rule::honoured(concat!($path, "/address@bus"), ONLY_BUS_0),
            Rule::honoured(concat!($path, "/address@slot"), SLOT),
            Rule::honoured(concat!($path, "/address@function"), ONLY_BUS_0),
            Rule::accepted(concat!($path, "/address@multifunction"), ONLY_BUS_0)
                .only(&["off"])
                .dropped(),
        ]
    };
}

pub(super) const PCI: &[Rule] = &[
    Rule::honoured("domain/devices/disk", "a virtio disk").many(),
    Rule::honoured(
        "domain/devices/disk@type",
        "`file` where there is none; disks over a network and in pools are not supported yet",
    )
    .only(&["file", "block"]),
    Rule::accepted(
        "domain/devices/disk@device",
        "CD-ROM and floppy drives are not supported yet",
    )
    .only(&["disk"])
    .dropped(),
    Rule::refused(
        "domain/devices/disk@snapshot",
        "a checkpoint always has all writable disks",
    ),
    Rule::honoured("domain/devices/disk/driver", ""),
    Rule::accepted(
        "domain/devices/disk/driver@name",
        "libvirt's name for a disk's driver",
    )
    .only(&["qemu"])
    .dropped(),
    Rule::honoured(
        "domain/devices/disk/driver@type",
        "`raw` where there is none; qcow2 in a file only. `qemu-img convert -O qcow2` makes an \
         image of any other format",
    )
    .only(&["raw", "qcow2"]),
    Rule::honoured(
        "domain/devices/disk/driver@cache",
        "`writeback` where there is none. The guest's flushes are honoured in all but `unsafe`",
    )
    .only(&[
        "default",
        "none",
        "writethrough",
        "writeback",
        "directsync",
        "unsafe",
    ]),
    Rule::honoured(
        "domain/devices/disk/driver@discard",
        "`ignore` where there is none",
    )
    .only(&["unmap", "ignore"]),
    Rule::accepted("domain/devices/disk/driver@io", OWN_THREAD)
        .only(&["threads", "native", "io_uring"])
        .dropped(),
    Rule::accepted(
        "domain/devices/disk/driver@error_policy",
        "the guest is told",
    )
    .only(&["report"])
    .dropped(),
    Rule::accepted(
        "domain/devices/disk/driver@rerror_policy",
        "the guest is told",
    )
    .only(&["report"])
    .dropped(),
    Rule::accepted(
        "domain/devices/disk/driver@detect_zeroes",
        "not supported yet",
    )
    .only(&["off"])
    .dropped(),
    Rule::refused("domain/devices/disk/driver@iothread", NOT_TUNED),
    Rule::refused("domain/devices/disk/driver@queues", NOT_TUNED),
    Rule::refused("domain/devices/disk/driver@queue_size", NOT_TUNED),
    Rule::refused("domain/devices/disk/driver@copy_on_read", NOT_TUNED),
    Rule::refused("domain/devices/disk/driver@iommu", NOT_TUNED),
    Rule::refused("domain/devices/disk/driver@packed", NOT_TUNED),
    Rule::honoured("domain/devices/disk/source", ""),
    Rule::honoured("domain/devices/disk/source@file", "type file"),
    Rule::honoured("domain/devices/disk/source@dev", "type block"),
    Rule::accepted(
        "domain/devices/disk/source@index",
        "belongs to a running machine; not kept",
    )
    .dropped(),
    Rule::refused("domain/devices/disk/source@startupPolicy", NOT_TUNED),
    Rule::refused("domain/devices/disk/source/encryption", NOT_TUNED),
    Rule::refused("domain/devices/disk/source/seclabel", "not supported"),
    Rule::accepted(
        "domain/devices/disk/backingStore",
        "a raw disk has none, and a qcow2 image says itself what it is based on; not kept",
    )
    .dropped(),
    Rule::honoured("domain/devices/disk/target", "").needs(&["dev"]),
    Rule::honoured("domain/devices/disk/target@dev", "`vd` and letters"),
    Rule::accepted("domain/devices/disk/target@bus", "disks are virtio devices")
        .only(&["virtio"])
        .dropped(),
    Rule::honoured("domain/devices/disk/readonly", ""),
    Rule::refused(
        "domain/devices/disk/shareable",
        "a writable disk is locked for one machine",
    ),
    Rule::refused("domain/devices/disk/transient", "not supported yet"),
    Rule::honoured("domain/devices/disk/serial", "at most 20 bytes").text(),
    Rule::refused("domain/devices/disk/wwn", NOT_TUNED),
    Rule::refused("domain/devices/disk/vendor", NOT_TUNED),
    Rule::refused("domain/devices/disk/product", NOT_TUNED),
    Rule::refused("domain/devices/disk/encryption", NOT_TUNED),
    Rule::refused("domain/devices/disk/iotune", NOT_TUNED),
    Rule::refused("domain/devices/disk/throttlefilters", NOT_TUNED),
    Rule::refused("domain/devices/disk/blockio", NOT_TUNED),
    Rule::refused("domain/devices/disk/geometry", NOT_TUNED),
    Rule::refused("domain/devices/disk/mirror", NOT_TUNED),
    Rule::refused("domain/devices/disk/auth", NOT_TUNED),
    Rule::refused(
        "domain/devices/disk/boot",
        "the machine starts the kernel that <os> gives",
    ),
];

const NO_NETWORK: &str = "networks of libvirt, and other types, are not supported yet: \
    put the tap on a bridge of the host";
const TAP: &str = "a tap of the host. `vnetN` belongs to a running machine and is not kept; \
    where there is none the machine makes a new tap at each start";
const SET_TAP: &str = "not supported yet: set it on the host, by the tap";

pub(super) const INTERFACE: &[Rule] = &[
    Rule::honoured("domain/devices/interface", "a virtio network device")
        .needs(&["type"])
        .many(),
    Rule::honoured("domain/devices/interface@type", NO_NETWORK).only(&["ethernet", "bridge"]),
    Rule::honoured(
        "domain/devices/interface/mac",
        "a random one where there is none, which the canonical form has",
    )
    .needs(&["address"]),
    Rule::honoured(
        "domain/devices/interface/mac@address",
        "`livepoint restore --new-identity` takes a new one",
    ),
    Rule::honoured("domain/devices/interface/source", "type bridge"),
    Rule::honoured(
        "domain/devices/interface/source@bridge",
        "a bridge of the host, which the machine puts its tap on; that needs CAP_NET_ADMIN",
    ),
    Rule::honoured("domain/devices/interface/target", ""),
    Rule::honoured("domain/devices/interface/target@dev", TAP),
    Rule::honoured(
        "domain/devices/interface/target@managed",
        "type ethernet: with `no` the tap has to be there, and is left as it is; the machine's \
         user must own it. Else it is made and brought up, which needs CAP_NET_ADMIN",
    )
    .only(&["yes", "no"]),
    Rule::accepted(
        "domain/devices/interface/model",
        "network devices are virtio devices",
    )
    .dropped(),
    Rule::accepted(
        "domain/devices/interface/model@type",
        "other models are not supported",
    )
    .only(&["virtio"])
    .dropped(),
    Rule::accepted(
        "domain/devices/interface/driver",
        "packets are carried by a thread of the machine's process",
    )
    .dropped(),
    Rule::accepted(
        "domain/devices/interface/driver@name",
        "vhost is not supported yet",
    )
    .only(&["qemu"])
    .dropped(),
    Rule::refused("domain/devices/interface/driver@queues", NOT_TUNED),
    Rule::refused("domain/devices/interface/driver@rx_queue_size", NOT_TUNED),
    Rule::refused("domain/devices/interface/driver@tx_queue_size", NOT_TUNED),
    Rule::honoured("domain/devices/interface/link", "").needs(&["state"]),
    Rule::honoured(
        "domain/devices/interface/link@state",
        "`up` where there is none; while it is down packets of both directions are dropped",
    )
    .only(&["up", "down"]),
    Rule::refused("domain/devices/interface/mtu", SET_TAP),
    Rule::refused("domain/devices/interface/bandwidth", SET_TAP),
    Rule::refused("domain/devices/interface/filterref", SET_TAP),
    Rule::refused("domain/devices/interface/vlan", SET_TAP),
    Rule::refused("domain/devices/interface/port", SET_TAP),
    Rule::refused("domain/devices/interface/virtualport", SET_TAP),
    Rule::refused("domain/devices/interface/coalesce", SET_TAP),
    Rule::refused("domain/devices/interface/tune", SET_TAP),
    Rule::refused("domain/devices/interface/guest", SET_TAP),
    Rule::refused("domain/devices/interface/ip", SET_TAP),
    Rule::refused("domain/devices/interface/route", SET_TAP),
    Rule::refused(
        "domain/devices/interface/script",
        "no script is run: make the tap before, and write managed='no'",
    ),
    Rule::refused(
        "domain/devices/interface/downscript",
        "no script is run: make the tap before, and write managed='no'",
    ),
    Rule::refused("domain/devices/interface/backend", NOT_TUNED),
    Rule::refused("domain/devices/interface/teaming", NOT_TUNED),
    Rule::refused(
        "domain/devices/interface/rom",
        "the machine has no firmware",
    ),
    Rule::refused(
        "domain/devices/interface/boot",
        "the machine starts the kernel that <os> gives",
    ),
];

pub(super) const DISK_PLACE: &[Rule] = placed!("domain/devices/disk");
pub(super) const INTERFACE_PLACE: &[Rule] = placed!("domain/devices/interface");
pub(super) const RNG_PLACE: &[Rule] = placed!("domain/devices/rng");

pub(super) const RNG: &[Rule] = &[
    Rule::honoured("domain/devices/rng", "a virtio source of random numbers")
        .needs(&["model"])
        .many(),
    Rule::honoured("domain/devices/rng@model", "the only one").only(&["virtio"]),
    Rule::honoured(
        "domain/devices/rng/rate",
        "as many as the guest wants where there is none",
    )
    .needs(&["bytes"]),
    Rule::honoured(
        "domain/devices/rng/rate@bytes",
        "bytes in a period, at least 1",
    ),
    Rule::honoured(
        "domain/devices/rng/rate@period",
        "milliseconds; 1000 where there is none",
    ),
    Rule::honoured(
        "domain/devices/rng/backend",
        "/dev/urandom or /dev/random; /dev/urandom where it is empty",
    )
    .needs(&["model"])
    .text(),
    Rule::honoured(
        "domain/devices/rng/backend@model",
        "other sources are not supported",
    )
    .only(&["random"]),
    Rule::refused("domain/devices/rng/driver", NOT_TUNED),
];

pub(super) const BALLOON_PLACE: &[Rule] = placed!("domain/devices/memballoon");

pub(super) const BALLOON: &[Rule] = &[
    Rule::honoured(
        "domain/devices/memballoon",
        "memory that the guest gives back, when it is asked to; none where there is none",
    )
    .needs(&["model"]),
    Rule::honoured("domain/devices/memballoon@model", "the only one").only(&["virtio", "none"]),
    Rule::honoured(
        "domain/devices/memballoon@autodeflate",
        "the guest takes memory back before it has none left",
    )
    .only(&["on", "off"]),
    Rule::honoured(
        "domain/devices/memballoon@freePageReporting",
        "the guest gives back what it does not use, by itself; it is not in images then",
    )
    .only(&["on", "off"]),
    Rule::honoured(
        "domain/devices/memballoon/stats",
        "the guest is asked how it uses its memory",
    ),
    Rule::honoured(
        "domain/devices/memballoon/stats@period",
        "seconds between two questions; 0, or none: only its driver's first answer is there",
    ),
    Rule::refused("domain/devices/memballoon/driver", NOT_TUNED),
];
