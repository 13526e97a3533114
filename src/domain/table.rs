//! The table of [`super::rules`], all but the devices.
//!
//! A note stands after "only `value`" in the reference and after the place in
//! an error message, and has to read well in both.

use super::rules::Rule;

const NO_FIRMWARE: &str = "firmware boot is not supported; \
    give <kernel>, and <initrd> where the kernel needs one";
const NO_CONTAINER: &str = "belongs to containers, not to virtual machines";
const NO_SMBIOS: &str = "the SMBIOS tables have the domain's uuid, and nothing of the user's";
const NO_TUNING: &str = "has no effect: the host's own scheduling and limits apply";
const NO_GUEST_NUMA: &str = "NUMA topology of the guest is not supported yet";
const NO_HIDING: &str = "what KVM tells the guest of itself is not configurable yet";

pub(super) const DOMAIN: &[Rule] = &[
    Rule::honoured("domain", "the document's outermost element").needs(&["type"]),
    Rule::honoured("domain@type", "machines run on KVM: write type='kvm'").only(&["kvm"]),
    Rule::accepted(
        "domain@id",
        "belongs to a running machine; not kept, shown in the live form",
    )
    .dropped(),
    Rule::accepted("domain@xmlns:PREFIX", "kept, for <metadata> to use"),
    Rule::honoured(
        "domain/name",
        "at most 200 bytes; no '/', no control character",
    )
    .text(),
    Rule::honoured("domain/uuid", "a random one where there is none").text(),
    Rule::honoured("domain/title", "one line").text(),
    Rule::honoured("domain/description", "").text(),
    Rule::honoured("domain/metadata", "kept byte for byte, namespaces included"),
    Rule::refused(
        "domain/genid",
        "every machine has a generation id, a new one each time that it starts or is restored",
    ),
    // Memory.
    Rule::honoured(
        "domain/memory",
        "rounded up to whole KiB, as libvirt does; then a multiple of 4 KiB, 1 MiB to 1 TiB",
    )
    .text(),
    Rule::honoured(
        "domain/memory@unit",
        "b, KB, KiB (default), MB, MiB, GB, GiB, TB, TiB and libvirt's short forms",
    ),
    Rule::honoured(
        "domain/memory@dumpCore",
        "guest memory is never part of a core dump of the process",
    )
    .only(&["off"]),
    Rule::accepted(
        "domain/currentMemory",
        "may not exceed <memory>; with a balloon how much of it the guest is to use at its start, \
         else it has all of it, which is shown",
    )
    .text()
    .dropped(),
    Rule::accepted("domain/currentMemory@unit", "as for <memory>").dropped(),
    Rule::refused(
        "domain/maxMemory",
        "memory hotplug is not supported; give the whole size in <memory>",
    ),
    Rule::accepted("domain/blkiotune", NO_TUNING)
        .subtree()
        .told(),
    Rule::accepted("domain/memtune", NO_TUNING).subtree().told(),
    Rule::honoured("domain/memoryBacking", ""),
    Rule::honoured(
        "domain/memoryBacking/hugepages",
        "from the host's hugetlb pool; 2 MiB pages where no <page> says otherwise",
    ),
    Rule::honoured(
        "domain/memoryBacking/hugepages/page",
        "one: the guest has one NUMA node",
    )
    .needs(&["size"]),
    Rule::honoured(
        "domain/memoryBacking/hugepages/page@size",
        "2 MiB or 1 GiB; <memory> must be a multiple",
    ),
    Rule::honoured(
        "domain/memoryBacking/hugepages/page@unit",
        "as for <memory>",
    ),
    Rule::refused("domain/memoryBacking/hugepages/page@nodeset", NO_GUEST_NUMA),
    Rule::accepted(
        "domain/memoryBacking/nosharepages",
        "guest memory is never offered for merging",
    ),
    Rule::honoured("domain/memoryBacking/locked", ""),
    Rule::honoured("domain/memoryBacking/source", "").needs(&["type"]),
    Rule::honoured(
        "domain/memoryBacking/source@type",
        "memory in a file of the host is not supported; use memfd",
    )
    .only(&["anonymous", "memfd"]),
    Rule::honoured("domain/memoryBacking/access", "").needs(&["mode"]),
    Rule::honoured(
        "domain/memoryBacking/access@mode",
        "`shared` needs source type='memfd'; such memory is checkpointed \
         only while no other process writes to it",
    )
    .only(&["private", "shared"]),
    Rule::honoured("domain/memoryBacking/allocation", "").needs(&["mode"]),
    Rule::honoured(
        "domain/memoryBacking/allocation@mode",
        "ondemand where there is none",
    )
    .only(&["immediate", "ondemand"]),
    Rule::accepted(
        "domain/memoryBacking/allocation@threads",
        "the number of allocating threads is chosen by the machine",
    ),
    Rule::accepted(
        "domain/memoryBacking/discard",
        "the kernel frees guest memory when the machine ends",
    ),
    // vCPUs.
    Rule::honoured("domain/vcpu", "1 to 16; 1 where there is none").text(),
    Rule::honoured(
        "domain/vcpu@current",
        "equal to the number of vCPUs: there is no vCPU hotplug",
    ),
    Rule::accepted(
        "domain/vcpu@placement",
        "vCPUs run wherever the host puts them",
    )
    .only(&["static", "auto"]),
    Rule::accepted("domain/vcpu@cpuset", NO_TUNING).told(),
    Rule::refused("domain/vcpus", "vCPU hotplug is not supported yet"),
    Rule::accepted("domain/iothreads", NO_TUNING)
        .subtree()
        .told(),
    Rule::accepted("domain/iothreadids", NO_TUNING)
        .subtree()
        .told(),
    Rule::accepted("domain/defaultiothread", NO_TUNING)
        .subtree()
        .told(),
    Rule::accepted("domain/cputune", NO_TUNING).subtree().told(),
    Rule::accepted("domain/numatune", NO_TUNING)
        .subtree()
        .told(),
    Rule::accepted("domain/resource", NO_TUNING)
        .subtree()
        .told(),
    // Boot.
    Rule::honoured("domain/os", ""),
    Rule::refused("domain/os@firmware", NO_FIRMWARE),
    Rule::honoured(
        "domain/os/type",
        "machines are fully virtualized: write hvm",
    )
    .text()
    .only(&["hvm"]),
    Rule::honoured("domain/os/type@arch", "the machine is an x86-64 PC").only(&["x86_64"]),
    Rule::accepted(
        "domain/os/type@machine",
        "there is one machine type, whatever the name",
    ),
    Rule::honoured(
        "domain/os/kernel",
        "an absolute path, or `builtin:NAME` for a guest that is part of the program",
    )
    .text(),
    Rule::honoured(
        "domain/os/initrd",
        "an absolute path; not with a `builtin:` kernel",
    )
    .text(),
    Rule::honoured("domain/os/cmdline", "at most 2047 bytes").text(),
    Rule::refused("domain/os/shim", NO_FIRMWARE),
    Rule::refused("domain/os/loader", NO_FIRMWARE),
    Rule::refused("domain/os/nvram", NO_FIRMWARE),
    Rule::refused("domain/os/varstore", NO_FIRMWARE),
    Rule::refused("domain/os/firmware", NO_FIRMWARE),
    Rule::accepted(
        "domain/os/boot",
        "a kernel that is given directly is always the one that boots",
    )
    .needs(&["dev"])
    .many(),
    Rule::accepted("domain/os/boot@dev", ""),
    Rule::accepted("domain/os/bootmenu", "there is no firmware to show a menu"),
    Rule::accepted("domain/os/bootmenu@enable", ""),
    Rule::accepted("domain/os/bootmenu@timeout", ""),
    Rule::refused("domain/os/bios", "the machine has no firmware to configure"),
    Rule::refused("domain/os/smbios", NO_SMBIOS),
    Rule::refused(
        "domain/os/acpi",
        "ACPI tables of the user are not supported",
    ),
    Rule::refused("domain/os/dtb", "x86 machines have no device tree"),
    Rule::refused("domain/os/init", NO_CONTAINER),
    Rule::refused("domain/os/initarg", NO_CONTAINER),
    Rule::refused("domain/os/initenv", NO_CONTAINER),
    Rule::refused("domain/os/initdir", NO_CONTAINER),
    Rule::refused("domain/os/inituser", NO_CONTAINER),
    Rule::refused("domain/os/initgroup", NO_CONTAINER),
    Rule::refused("domain/idmap", NO_CONTAINER),
    Rule::refused("domain/bootloader", "belongs to Xen paravirtualization"),
    Rule::refused(
        "domain/bootloader_args",
        "belongs to Xen paravirtualization",
    ),
    Rule::refused("domain/sysinfo", NO_SMBIOS),
    // Features.
    Rule::honoured("domain/features", ""),
    Rule::accepted("domain/features/acpi", "part of every machine"),
    Rule::accepted("domain/features/apic", "part of every machine"),
    Rule::accepted("domain/features/apic@eoi", "").only(&["on", "off"]),
    Rule::accepted("domain/features/pae", "part of every machine"),
    Rule::accepted("domain/features/hap", "KVM uses it wherever the host can"),
    Rule::accepted(
        "domain/features/hap@state",
        "KVM uses it wherever the host can",
    )
    .only(&["on"]),
    Rule::honoured(
        "domain/features/pmu",
        "the guest's performance counters; the host's choice where there is none",
    ),
    Rule::honoured("domain/features/pmu@state", "on where there is none").only(&["on", "off"]),
    Rule::honoured(
        "domain/features/pvspinlock",
        "paravirtual spinlocks; the host's choice where there is none",
    ),
    Rule::honoured("domain/features/pvspinlock@state", "on where there is none")
        .only(&["on", "off"]),
    Rule::accepted("domain/features/kvm", ""),
    Rule::accepted("domain/features/kvm/hidden", "").needs(&["state"]),
    Rule::accepted("domain/features/kvm/hidden@state", NO_HIDING).only(&["off"]),
    Rule::accepted("domain/features/kvm/hint-dedicated", "").needs(&["state"]),
    Rule::accepted("domain/features/kvm/hint-dedicated@state", NO_HIDING).only(&["off"]),
    Rule::accepted("domain/features/kvm/poll-control", "").needs(&["state"]),
    Rule::accepted("domain/features/kvm/poll-control@state", NO_HIDING).only(&["off"]),
    Rule::accepted("domain/features/kvm/pv-ipi", "").needs(&["state"]),
    Rule::accepted("domain/features/kvm/pv-ipi@state", NO_HIDING).only(&["off"]),
    Rule::accepted(
        "domain/features/kvm/dirty-ring",
        "how dirty pages are tracked is chosen per checkpoint",
    ),
    Rule::accepted("domain/features/kvm/dirty-ring@state", "").only(&["on", "off"]),
    Rule::accepted("domain/features/kvm/dirty-ring@size", ""),
    Rule::accepted("domain/features/vmport", "").needs(&["state"]),
    Rule::accepted(
        "domain/features/vmport@state",
        "the machine has no VMware port",
    )
    .only(&["off"]),
    Rule::accepted("domain/features/smm", "").needs(&["state"]),
    Rule::accepted(
        "domain/features/smm@state",
        "the machine has no system management mode",
    )
    .only(&["off"]),
    Rule::accepted("domain/features/ps2", "").needs(&["state"]),
    Rule::accepted(
        "domain/features/ps2@state",
        "the machine has no PS/2 controller",
    )
    .only(&["off"]),
    Rule::accepted("domain/features/ioapic", "").needs(&["driver"]),
    Rule::accepted(
        "domain/features/ioapic@driver",
        "the interrupt controllers are KVM's",
    )
    .only(&["kvm"]),
    Rule::refused(
        "domain/features/hyperv",
        "Hyper-V enlightenments are not supported yet",
    ),
    Rule::refused(
        "domain/features/xen",
        "Xen enlightenments are not supported",
    ),
    Rule::refused("domain/features/viridian", "belongs to Xen"),
    Rule::refused("domain/features/vmcoreinfo", "not supported yet"),
    Rule::refused("domain/features/msrs", "not supported yet"),
    Rule::refused("domain/features/tcg", "belongs to emulation, not to KVM"),
    Rule::refused("domain/features/gic", "belongs to ARM machines"),
    Rule::refused("domain/features/privnet", NO_CONTAINER),
    Rule::refused("domain/features/capabilities", NO_CONTAINER),
    // CPU.
    Rule::honoured(
        "domain/cpu",
        "the host's own CPU where there is none, or no mode",
    ),
    Rule::honoured(
        "domain/cpu@mode",
        "`host-model` is treated as `host-passthrough`; `custom` needs a <model>",
    )
    .only(&["host-passthrough", "host-model", "custom"]),
    Rule::accepted(
        "domain/cpu@match",
        "the guest sees exactly the CPU described: write match='exact'",
    )
    .only(&["exact"]),
    Rule::accepted(
        "domain/cpu@check",
        "each feature is always checked against the host, by its policy",
    )
    .only(&["none", "partial", "full"]),
    Rule::accepted(
        "domain/cpu@migratable",
        "a restore checks the CPU of its host in any case",
    )
    .only(&["on", "off"]),
    Rule::honoured(
        "domain/cpu/model",
        "with mode='custom': x86-64-v1, x86-64-v2, x86-64-v3 or x86-64-v4; empty otherwise",
    )
    .text(),
    Rule::accepted(
        "domain/cpu/model@fallback",
        "there is no other model to fall back to",
    )
    .only(&["allow", "forbid"]),
    Rule::refused(
        "domain/cpu/model@vendor_id",
        "the guest sees the vendor of the host's CPU",
    ),
    Rule::refused(
        "domain/cpu/vendor",
        "the guest sees the vendor of the host's CPU",
    ),
    Rule::honoured("domain/cpu/topology", "the product is the number of vCPUs")
        .needs(&["sockets", "cores", "threads"]),
    Rule::honoured("domain/cpu/topology@sockets", ""),
    Rule::honoured("domain/cpu/topology@dies", "1 where there is none"),
    Rule::accepted("domain/cpu/topology@clusters", "x86 CPUs have no clusters")
        .only(&["1"])
        .dropped(),
    Rule::honoured("domain/cpu/topology@cores", ""),
    Rule::honoured("domain/cpu/topology@threads", ""),
    Rule::honoured("domain/cpu/feature", "")
        .needs(&["name"])
        .many(),
    Rule::honoured(
        "domain/cpu/feature@name",
        "one that libvirt and this program both name",
    ),
    Rule::honoured("domain/cpu/feature@policy", "require where there is none"),
    Rule::refused(
        "domain/cpu/cache",
        "cache topology of the guest is not supported yet",
    ),
    Rule::refused(
        "domain/cpu/maxphysaddr",
        "the guest's physical address width is the host's",
    ),
    Rule::refused("domain/cpu/numa", NO_GUEST_NUMA),
    // Clock.
    Rule::honoured("domain/clock", "UTC where there is none").needs(&["offset"]),
    Rule::honoured(
        "domain/clock@offset",
        "what the guest's real-time clock shows at the start",
    )
    .only(&["utc", "localtime", "timezone", "variable"]),
    Rule::honoured("domain/clock@timezone", "with offset='timezone'"),
    Rule::honoured(
        "domain/clock@adjustment",
        "seconds, with offset='variable' only",
    ),
    Rule::honoured("domain/clock@basis", "with offset='variable' only").only(&["utc", "localtime"]),
    Rule::honoured("domain/clock/timer[kvmclock]", ""),
    Rule::honoured("domain/clock/timer[kvmclock]@present", "").only(&["yes", "no"]),
    Rule::honoured("domain/clock/timer[pit]", ""),
    Rule::honoured("domain/clock/timer[pit]@present", "every machine has one").only(&["yes"]),
    Rule::honoured(
        "domain/clock/timer[pit]@tickpolicy",
        "KVM's timer chip can only deliver missed ticks late, or drop them",
    )
    .only(&["delay", "discard"]),
    Rule::accepted("domain/clock/timer[rtc]", ""),
    Rule::accepted("domain/clock/timer[rtc]@present", "every machine has one").only(&["yes"]),
    Rule::accepted(
        "domain/clock/timer[rtc]@tickpolicy",
        "the clock is read by the guest and delivers no ticks",
    )
    .only(&["delay", "catchup"]),
    Rule::accepted("domain/clock/timer[tsc]", ""),
    Rule::accepted(
        "domain/clock/timer[tsc]@present",
        "every x86-64 CPU has one",
    )
    .only(&["yes"]),
    Rule::accepted(
        "domain/clock/timer[tsc]@mode",
        "the guest reads the CPU's own counter",
    )
    .only(&["auto", "native"]),
    Rule::refused(
        "domain/clock/timer[tsc]@frequency",
        "the counter runs at the host's rate",
    ),
    Rule::accepted("domain/clock/timer[hpet]", "").needs(&["present"]),
    Rule::accepted(
        "domain/clock/timer[hpet]@present",
        "the machine has no HPET",
    )
    .only(&["no"]),
    Rule::accepted("domain/clock/timer[hypervclock]", "").needs(&["present"]),
    Rule::accepted(
        "domain/clock/timer[hypervclock]@present",
        "Hyper-V enlightenments are not supported yet",
    )
    .only(&["no"]),
    Rule::refused("domain/clock/timer[platform]", "belongs to Xen"),
    Rule::refused("domain/clock/timer[armvtimer]", "belongs to ARM machines"),
    // Lifecycle.
    Rule::honoured(
        "domain/on_poweroff",
        "renaming is not supported; the default is destroy",
    )
    .text()
    .only(&["destroy", "restart", "preserve"]),
    Rule::honoured(
        "domain/on_reboot",
        "renaming is not supported; the default is restart",
    )
    .text()
    .only(&["destroy", "restart", "preserve"]),
    Rule::honoured(
        "domain/on_crash",
        "core dumps are not supported; the default is destroy",
    )
    .text()
    .only(&["destroy", "restart", "preserve"]),
    Rule::refused("domain/on_lockfailure", "there is no lock manager"),
    Rule::accepted("domain/pm", ""),
    Rule::accepted("domain/pm/suspend-to-mem", "").needs(&["enabled"]),
    Rule::accepted(
        "domain/pm/suspend-to-mem@enabled",
        "the machine has no sleep states",
    )
    .only(&["no"]),
    Rule::accepted("domain/pm/suspend-to-disk", "").needs(&["enabled"]),
    Rule::accepted(
        "domain/pm/suspend-to-disk@enabled",
        "the machine has no sleep states",
    )
    .only(&["no"]),
    Rule::accepted("domain/perf", "no perf event is opened")
        .subtree()
        .told(),
];

/// What stands after the devices.
pub(super) const SECURITY: &[Rule] = &[
    Rule::accepted(
        "domain/seclabel",
        "no label is put on the machine's process or files",
    )
    .many()
    .needs(&["type"]),
    Rule::accepted(
        "domain/seclabel@type",
        "no label is put on the machine's process or files",
    )
    .only(&["none", "dynamic"]),
    Rule::accepted("domain/seclabel@model", ""),
    Rule::accepted("domain/seclabel@relabel", ""),
    Rule::accepted("domain/seclabel/label", "").text(),
    Rule::accepted("domain/seclabel/imagelabel", "").text(),
    Rule::accepted("domain/seclabel/baselabel", "").text(),
    Rule::refused(
        "domain/launchSecurity",
        "memory that the host cannot read cannot be checkpointed",
    ),
    Rule::refused("domain/keywrap", "belongs to s390x machines"),
];
