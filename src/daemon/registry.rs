//! The list of domains.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::managed::Managed;
use crate::rpc::{Code, DomainRef, RpcError};

/// All domains. Its lock is taken before a domain's, never while one is held.
#[derive(Debug, Default)]
pub(super) struct Registry {
    domains: Mutex<BTreeMap<Uuid, Arc<Managed>>>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Uuid, Arc<Managed>>> {
        // Every change is one call, so a panic leaves nothing half-changed.
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn all(&self) -> Vec<Arc<Managed>> {
        self.lock().values().cloned().collect()
    }

    pub(super) fn by_uuid(&self, uuid: Uuid) -> Option<Arc<Managed>> {
        self.lock().get(&uuid).cloned()
    }

    pub(super) fn by_name(&self, name: &str) -> Option<Arc<Managed>> {
        let domains = self.lock();
        domains
            .values()
            .find(|domain| domain.lock().name == name)
            .cloned()
    }

    pub(super) fn by_id(&self, id: i32) -> Option<Arc<Managed>> {
        let has_id = |domain: &&Arc<Managed>| domain.reference().id == id;
        self.lock()
            .values()
            .find(has_id)
            .cloned()
            .filter(|_| id >= 0)
    }

    /// Returns the domain that a call names; its UUID alone counts.
    pub(super) fn find(&self, wanted: &DomainRef) -> Result<Arc<Managed>, RpcError> {
        self.by_uuid(wanted.uuid).ok_or_else(|| {
            RpcError::new(
                Code::NoDomain,
                format!(
                    "no domain with matching uuid '{}' ({})",
                    wanted.uuid, wanted.name
                ),
            )
        })
    }

    pub(super) fn insert(&self, domain: Arc<Managed>) {
        self.lock().insert(domain.uuid, domain);
    }

    pub(super) fn remove(&self, uuid: Uuid) {
        self.lock().remove(&uuid);
    }
}
