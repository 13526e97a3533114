//! A worker that gives up rights once its machine's files are open, and what it keeps for later.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;

use super::args::WorkerArgs;
use crate::host::confine::{Confinement, User};
use crate::host::control::ControlSocket;
use crate::host::{DomainOptions, FinalState, HostError, RuntimeDir, WhenOpen, write_whole_file};

/// What a worker has made ahead, because it may not be able to later.
#[derive(Debug, Default)]
pub(super) struct Kept {
    socket: Arc<Mutex<Option<ControlSocket>>>,
    final_state: Option<File>,
}

impl Kept {
    /// Has a domain confine the process as `args` say; keeps what is needed later.
    pub(super) fn new(
        runtime: RuntimeDir,
        args: &WorkerArgs,
        options: &mut DomainOptions,
    ) -> anyhow::Result<Self> {
        let user = args.user.as_deref().map(User::named).transpose();
        let confinement = Confinement {
            calls: args.seccomp.map(Into::into),
            files: args.landlock,
            image_dirs: args.image_dir.clone(),
            user: user.context("--user")?,
        };
        let mut kept = Self::default();
        if !confinement.is_any() {
            return Ok(kept);
        }
        if let Some(file) = &args.final_state {
            let made = File::create(file);
            let made = made.with_context(|| format!("could not write {}", file.display()))?;
            kept.final_state = Some(made);
        }
        let socket = kept.socket.clone();
        let is_confined = AtomicBool::new(false);
        options.when_open = Some(WhenOpen::new(move |files| {
            // A machine that is started again is confined already.
            if is_confined.swap(true, Ordering::AcqRel) {
                return Ok(());
            }
            let bind = || -> Result<ControlSocket, HostError> {
                ControlSocket::bind(&runtime.socket(&files.name)?)
            };
            let bound = bind().map_err(|error| io::Error::other(error.full_message()))?;
            *socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(bound);
            confinement.apply(files)
        }));
        Ok(kept)
    }

    /// Returns the control socket, if it was made ahead.
    pub(super) fn socket(&self) -> Option<ControlSocket> {
        self.socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Tells a daemon that was not there how the domain ended.
    pub(super) fn write_final_state(
        &mut self,
        file: &Path,
        state: &FinalState,
    ) -> anyhow::Result<()> {
        let json = serde_json::to_vec(state)?;
        let written = match &mut self.final_state {
            // Whoever finds half of it finds no state.
            Some(kept) => kept.write_all(&json),
            None => write_whole_file(file, &json),
        };
        written.with_context(|| format!("could not write {}", file.display()))
    }
}
