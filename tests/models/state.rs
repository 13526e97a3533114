//! Saved state: there is none in the models.

#[derive(Clone, Debug)]
pub struct StateSection;

#[derive(Clone, Debug)]
pub struct HostFacts;

#[derive(Debug, thiserror::Error)]
#[error("no state")]
pub struct StateError;
