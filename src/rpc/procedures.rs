//! The procedures of libvirt's remote program, version 1: their numbers, their names, and whether
//! a read-only connection may call them. The same in libvirt 9.0 to 12.8.

/// A procedure, or an event, of the remote program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its number on the wire.
    pub number: i32,
    /// Its name in the protocol, without `REMOTE_PROC_`.
    pub name: &'static str,
    /// Whether read-only connections are refused.
    pub writes: bool,
}

impl Known {
    /// Returns the name of the library function that makes the call, as errors name it.
    pub fn function(&self) -> String {
        let mut name = "vir".to_owned();
        for word in self.name.split('_') {
            match word {
                "XML" | "OS" | "URI" | "CPU" | "ID" | "UUID" if name.len() > 3 => {
                    name.push_str(word);
                }
                _ => {
                    let (first, rest) = word.split_at(1);
                    name.push_str(first);
                    name.push_str(&rest.to_ascii_lowercase());
                }
            }
        }
        name
    }
}

const fn reads(number: i32, name: &'static str) -> Known {
    Known {
        number,
        name,
        writes: false,
    }
}

const fn writes(number: i32, name: &'static str) -> Known {
    Known {
        number,
        name,
        writes: true,
    }
}

/// Returns what is known of procedure `number`.
pub fn known(number: i32) -> Option<&'static Known> {
    let at = KNOWN.binary_search_by_key(&number, |known| known.number);
    at.ok().and_then(|at| KNOWN.get(at))
}

/// The procedures that a hypervisor driver is asked for, by number; networks, storage and the rest
/// of libvirt only as far as clients of a hypervisor call them.
pub const KNOWN: &[Known] = &[
    reads(1, "CONNECT_OPEN"),
    reads(2, "CONNECT_CLOSE"),
    reads(3, "CONNECT_GET_TYPE"),
    reads(4, "CONNECT_GET_VERSION"),
    reads(5, "CONNECT_GET_MAX_VCPUS"),
    reads(6, "NODE_GET_INFO"),
    reads(7, "CONNECT_GET_CAPABILITIES"),
    writes(8, "DOMAIN_ATTACH_DEVICE"),
    writes(9, "DOMAIN_CREATE"),
    writes(10, "DOMAIN_CREATE_XML"),
    writes(11, "DOMAIN_DEFINE_XML"),
    writes(12, "DOMAIN_DESTROY"),
    writes(13, "DOMAIN_DETACH_DEVICE"),
    reads(14, "DOMAIN_GET_XML_DESC"),
    reads(15, "DOMAIN_GET_AUTOSTART"),
    reads(16, "DOMAIN_GET_INFO"),
    reads(17, "DOMAIN_GET_MAX_MEMORY"),
    reads(18, "DOMAIN_GET_MAX_VCPUS"),
    reads(19, "DOMAIN_GET_OS_TYPE"),
    reads(20, "DOMAIN_GET_VCPUS"),
    reads(21, "CONNECT_LIST_DEFINED_DOMAINS"),
    reads(22, "DOMAIN_LOOKUP_BY_ID"),
    reads(23, "DOMAIN_LOOKUP_BY_NAME"),
    reads(24, "DOMAIN_LOOKUP_BY_UUID"),
    reads(25, "CONNECT_NUM_OF_DEFINED_DOMAINS"),
    writes(26, "DOMAIN_PIN_VCPU"),
    writes(27, "DOMAIN_REBOOT"),
    writes(28, "DOMAIN_RESUME"),
    writes(29, "DOMAIN_SET_AUTOSTART"),
    writes(30, "DOMAIN_SET_MAX_MEMORY"),
    writes(31, "DOMAIN_SET_MEMORY"),
    writes(32, "DOMAIN_SET_VCPUS"),
    writes(33, "DOMAIN_SHUTDOWN"),
    writes(34, "DOMAIN_SUSPEND"),
    writes(35, "DOMAIN_UNDEFINE"),
    reads(36, "CONNECT_LIST_DEFINED_NETWORKS"),
    reads(37, "CONNECT_LIST_DOMAINS"),
    reads(38, "CONNECT_LIST_NETWORKS"),
    reads(50, "CONNECT_NUM_OF_DEFINED_NETWORKS"),
    reads(51, "CONNECT_NUM_OF_DOMAINS"),
    reads(52, "CONNECT_NUM_OF_NETWORKS"),
    writes(53, "DOMAIN_CORE_DUMP"),
    writes(54, "DOMAIN_RESTORE"),
    writes(55, "DOMAIN_SAVE"),
    reads(56, "DOMAIN_GET_SCHEDULER_TYPE"),
    reads(59, "CONNECT_GET_HOSTNAME"),
    reads(60, "CONNECT_SUPPORTS_FEATURE"),
    reads(64, "DOMAIN_BLOCK_STATS"),
    reads(65, "DOMAIN_INTERFACE_STATS"),
    reads(66, "AUTH_LIST"),
    reads(70, "AUTH_POLKIT"),
    reads(71, "CONNECT_NUM_OF_STORAGE_POOLS"),
    reads(72, "CONNECT_LIST_STORAGE_POOLS"),
    reads(73, "CONNECT_NUM_OF_DEFINED_STORAGE_POOLS"),
    reads(74, "CONNECT_LIST_DEFINED_STORAGE_POOLS"),
    reads(101, "NODE_GET_CELLS_FREE_MEMORY"),
    reads(102, "NODE_GET_FREE_MEMORY"),
    writes(103, "DOMAIN_BLOCK_PEEK"),
    writes(104, "DOMAIN_MEMORY_PEEK"),
    reads(105, "CONNECT_DOMAIN_EVENT_REGISTER"),
    reads(106, "CONNECT_DOMAIN_EVENT_DEREGISTER"),
    reads(110, "CONNECT_GET_URI"),
    reads(111, "NODE_NUM_OF_DEVICES"),
    reads(121, "DOMAIN_GET_SECURITY_LABEL"),
    reads(122, "NODE_GET_SECURITY_MODEL"),
    reads(126, "CONNECT_NUM_OF_INTERFACES"),
    reads(139, "CONNECT_NUM_OF_SECRETS"),
    reads(149, "CONNECT_IS_SECURE"),
    reads(150, "DOMAIN_IS_ACTIVE"),
    reads(151, "DOMAIN_IS_PERSISTENT"),
    reads(157, "CONNECT_GET_LIB_VERSION"),
    reads(158, "CONNECT_COMPARE_CPU"),
    reads(159, "DOMAIN_MEMORY_STATS"),
    writes(160, "DOMAIN_ATTACH_DEVICE_FLAGS"),
    writes(161, "DOMAIN_DETACH_DEVICE_FLAGS"),
    reads(162, "CONNECT_BASELINE_CPU"),
    reads(163, "DOMAIN_GET_JOB_INFO"),
    writes(164, "DOMAIN_ABORT_JOB"),
    writes(166, "DOMAIN_MIGRATE_SET_MAX_DOWNTIME"),
    reads(167, "CONNECT_DOMAIN_EVENT_REGISTER_ANY"),
    reads(168, "CONNECT_DOMAIN_EVENT_DEREGISTER_ANY"),
    writes(174, "DOMAIN_UPDATE_DEVICE_FLAGS"),
    reads(178, "CONNECT_NUM_OF_NWFILTERS"),
    reads(179, "CONNECT_LIST_NWFILTERS"),
    writes(182, "DOMAIN_MANAGED_SAVE"),
    reads(183, "DOMAIN_HAS_MANAGED_SAVE_IMAGE"),
    writes(184, "DOMAIN_MANAGED_SAVE_REMOVE"),
    writes(185, "DOMAIN_SNAPSHOT_CREATE_XML"),
    reads(186, "DOMAIN_SNAPSHOT_GET_XML_DESC"),
    reads(187, "DOMAIN_SNAPSHOT_NUM"),
    reads(188, "DOMAIN_SNAPSHOT_LIST_NAMES"),
    reads(189, "DOMAIN_SNAPSHOT_LOOKUP_BY_NAME"),
    reads(190, "DOMAIN_HAS_CURRENT_SNAPSHOT"),
    reads(191, "DOMAIN_SNAPSHOT_CURRENT"),
    writes(192, "DOMAIN_REVERT_TO_SNAPSHOT"),
    writes(193, "DOMAIN_SNAPSHOT_DELETE"),
    reads(194, "DOMAIN_GET_BLOCK_INFO"),
    writes(196, "DOMAIN_CREATE_WITH_FLAGS"),
    reads(198, "DOMAIN_GET_MEMORY_PARAMETERS"),
    writes(199, "DOMAIN_SET_VCPUS_FLAGS"),
    writes(200, "DOMAIN_GET_VCPUS_FLAGS"),
    writes(201, "DOMAIN_OPEN_CONSOLE"),
    reads(202, "DOMAIN_IS_UPDATED"),
    reads(203, "CONNECT_GET_SYSINFO"),
    writes(204, "DOMAIN_SET_MEMORY_FLAGS"),
    reads(206, "DOMAIN_GET_BLKIO_PARAMETERS"),
    writes(207, "DOMAIN_MIGRATE_SET_MAX_SPEED"),
    writes(210, "DOMAIN_INJECT_NMI"),
    writes(211, "DOMAIN_SCREENSHOT"),
    reads(212, "DOMAIN_GET_STATE"),
    reads(223, "DOMAIN_GET_SCHEDULER_PARAMETERS_FLAGS"),
    writes(225, "DOMAIN_PIN_VCPU_FLAGS"),
    writes(226, "DOMAIN_SEND_KEY"),
    reads(227, "NODE_GET_CPU_STATS"),
    reads(228, "NODE_GET_MEMORY_STATS"),
    reads(229, "DOMAIN_GET_CONTROL_INFO"),
    reads(230, "DOMAIN_GET_VCPU_PIN_INFO"),
    writes(231, "DOMAIN_UNDEFINE_FLAGS"),
    writes(232, "DOMAIN_SAVE_FLAGS"),
    writes(233, "DOMAIN_RESTORE_FLAGS"),
    writes(234, "DOMAIN_DESTROY_FLAGS"),
    writes(235, "DOMAIN_SAVE_IMAGE_GET_XML_DESC"),
    writes(236, "DOMAIN_SAVE_IMAGE_DEFINE_XML"),
    writes(242, "DOMAIN_MIGRATE_GET_MAX_SPEED"),
    reads(243, "DOMAIN_BLOCK_STATS_FLAGS"),
    reads(244, "DOMAIN_SNAPSHOT_GET_PARENT"),
    writes(245, "DOMAIN_RESET"),
    reads(246, "DOMAIN_SNAPSHOT_NUM_CHILDREN"),
    reads(247, "DOMAIN_SNAPSHOT_LIST_CHILDREN_NAMES"),
    writes(249, "DOMAIN_OPEN_GRAPHICS"),
    writes(251, "DOMAIN_BLOCK_RESIZE"),
    writes(258, "DOMAIN_SHUTDOWN_FLAGS"),
    writes(261, "DOMAIN_PM_SUSPEND_FOR_DURATION"),
    reads(262, "DOMAIN_GET_CPU_STATS"),
    reads(263, "DOMAIN_GET_DISK_ERRORS"),
    writes(264, "DOMAIN_SET_METADATA"),
    reads(265, "DOMAIN_GET_METADATA"),
    writes(267, "DOMAIN_PM_WAKEUP"),
    reads(271, "DOMAIN_SNAPSHOT_IS_CURRENT"),
    reads(272, "DOMAIN_SNAPSHOT_HAS_METADATA"),
    reads(273, "CONNECT_LIST_ALL_DOMAINS"),
    reads(274, "DOMAIN_LIST_ALL_SNAPSHOTS"),
    reads(275, "DOMAIN_SNAPSHOT_LIST_ALL_CHILDREN"),
    writes(277, "DOMAIN_GET_HOSTNAME"),
    reads(281, "CONNECT_LIST_ALL_STORAGE_POOLS"),
    reads(283, "CONNECT_LIST_ALL_NETWORKS"),
    reads(284, "CONNECT_LIST_ALL_INTERFACES"),
    reads(285, "CONNECT_LIST_ALL_NODE_DEVICES"),
    reads(286, "CONNECT_LIST_ALL_NWFILTERS"),
    reads(287, "CONNECT_LIST_ALL_SECRETS"),
    reads(293, "NODE_GET_CPU_MAP"),
    writes(296, "DOMAIN_OPEN_CHANNEL"),
    reads(298, "DOMAIN_GET_JOB_STATS"),
    writes(308, "DOMAIN_SET_MEMORY_STATS_PERIOD"),
    writes(309, "DOMAIN_CREATE_XML_WITH_FILES"),
    writes(310, "DOMAIN_CREATE_WITH_FILES"),
    reads(312, "CONNECT_GET_CPU_MODEL_NAMES"),
    reads(313, "CONNECT_NETWORK_EVENT_REGISTER_ANY"),
    reads(316, "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY"),
    reads(317, "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY"),
    reads(318, "DOMAIN_EVENT_CALLBACK_LIFECYCLE"),
    reads(319, "DOMAIN_EVENT_CALLBACK_REBOOT"),
    reads(324, "DOMAIN_EVENT_CALLBACK_IO_ERROR_REASON"),
    reads(331, "DOMAIN_EVENT_CALLBACK_BALLOON_CHANGE"),
    reads(333, "DOMAIN_EVENT_CALLBACK_DEVICE_REMOVED"),
    writes(334, "DOMAIN_CORE_DUMP_WITH_FORMAT"),
    writes(337, "DOMAIN_GET_TIME"),
    reads(340, "NODE_GET_FREE_PAGES"),
    writes(342, "CONNECT_GET_DOMAIN_CAPABILITIES"),
    writes(343, "DOMAIN_OPEN_GRAPHICS_FD"),
    reads(344, "CONNECT_GET_ALL_DOMAIN_STATS"),
    reads(346, "DOMAIN_EVENT_CALLBACK_TUNABLE"),
    reads(348, "DOMAIN_EVENT_CALLBACK_AGENT_LIFECYCLE"),
    writes(349, "DOMAIN_GET_FSINFO"),
    writes(350, "DOMAIN_DEFINE_XML_FLAGS"),
    writes(353, "DOMAIN_INTERFACE_ADDRESSES"),
    reads(354, "DOMAIN_EVENT_CALLBACK_DEVICE_ADDED"),
    writes(358, "DOMAIN_RENAME"),
    reads(359, "DOMAIN_EVENT_CALLBACK_MIGRATION_ITERATION"),
    reads(360, "CONNECT_REGISTER_CLOSE_CALLBACK"),
    reads(361, "CONNECT_UNREGISTER_CLOSE_CALLBACK"),
    reads(362, "CONNECT_EVENT_CONNECTION_CLOSED"),
    reads(363, "DOMAIN_EVENT_CALLBACK_JOB_COMPLETED"),
    reads(368, "CONNECT_STORAGE_POOL_EVENT_REGISTER_ANY"),
    reads(374, "CONNECT_NODE_DEVICE_EVENT_REGISTER_ANY"),
    reads(379, "DOMAIN_EVENT_CALLBACK_METADATA_CHANGE"),
    reads(387, "DOMAIN_MIGRATE_GET_MAX_DOWNTIME"),
    reads(388, "DOMAIN_MANAGED_SAVE_GET_XML_DESC"),
    writes(389, "DOMAIN_MANAGED_SAVE_DEFINE_XML"),
    writes(390, "DOMAIN_SET_LIFECYCLE_ACTION"),
    writes(411, "DOMAIN_CHECKPOINT_CREATE_XML"),
    reads(412, "DOMAIN_CHECKPOINT_GET_XML_DESC"),
    reads(413, "DOMAIN_LIST_ALL_CHECKPOINTS"),
    reads(414, "DOMAIN_CHECKPOINT_LIST_ALL_CHILDREN"),
    reads(415, "DOMAIN_CHECKPOINT_LOOKUP_BY_NAME"),
    reads(416, "DOMAIN_CHECKPOINT_GET_PARENT"),
    writes(417, "DOMAIN_CHECKPOINT_DELETE"),
    reads(419, "CONNECT_SET_IDENTITY"),
    writes(421, "DOMAIN_BACKUP_BEGIN"),
    reads(422, "DOMAIN_BACKUP_GET_XML_DESC"),
    reads(426, "DOMAIN_GET_MESSAGES"),
    writes(427, "DOMAIN_START_DIRTY_RATE_CALC"),
    writes(440, "DOMAIN_SAVE_PARAMS"),
    writes(441, "DOMAIN_RESTORE_PARAMS"),
    writes(442, "DOMAIN_ABORT_JOB_FLAGS"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn procedures_are_sorted_and_named_like_the_library_function() {
        assert!(KNOWN.is_sorted_by_key(|known| known.number));
        assert_eq!(KNOWN.len(), 205);
        let function = |number| known(number).unwrap().function();
        assert_eq!(function(8), "virDomainAttachDevice");
        assert_eq!(function(14), "virDomainGetXMLDesc");
        assert_eq!(function(10), "virDomainCreateXML");
        assert!(known(9999).is_none());
    }
}
