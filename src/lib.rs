//! livepoint
