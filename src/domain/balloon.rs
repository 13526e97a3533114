//! The memory balloon.

use super::memory::MemorySize;

/// A balloon, as a virtio device: memory that the guest gives back to the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Balloon {
    /// Whether the guest reports free memory by itself; `None`: the document does not say, so it
    /// does not.
    pub free_page_reporting: Option<bool>,
    /// Whether the guest may take memory back before it has none left; `None`: the document does
    /// not say, so it may not.
    pub auto_deflate: Option<bool>,
    /// Seconds between two questions to the guest how it uses its memory; 0 for none.
    pub statistics_period_s: u32,
    /// How much memory the guest is to use at its start; `None` for all that there is.
    pub current: Option<MemorySize>,
}
