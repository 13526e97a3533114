//! `crate::sync` of the models: the same names as in `src/sync.rs`, scheduled by loom.

use std::sync::LockResult;
use std::time::Duration;

use loom::sync::atomic::{AtomicBool, Ordering};

pub(crate) use loom::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard};
pub(crate) use std::sync::PoisonError;

pub(crate) mod atomic {
    pub(crate) use loom::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };
}

pub(crate) mod thread {
    pub(crate) use loom::thread::JoinHandle;
}

/// A condition variable whose waits with a timeout time out at once.
#[derive(Debug)]
pub(crate) struct Condvar(loom::sync::Condvar);

impl Condvar {
    pub(crate) fn new() -> Self {
        Self(loom::sync::Condvar::new())
    }

    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        self.0.wait(guard)
    }

    pub(crate) fn wait_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        mut waits: impl FnMut(&mut T) -> bool,
    ) -> LockResult<MutexGuard<'a, T>> {
        while waits(&mut guard) {
            guard = self.0.wait(guard).unwrap();
        }
        Ok(guard)
    }

    /// No more is known of a timeout than that it comes some time: here, before anything else.
    pub(crate) fn wait_timeout_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        _time: Duration,
        mut waits: impl FnMut(&mut T) -> bool,
    ) -> LockResult<(MutexGuard<'a, T>, bool)> {
        let timed_out = waits(&mut guard);
        Ok((guard, timed_out))
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// A cell that is set once. Who finds it set sees what came before.
#[derive(Debug)]
pub(crate) struct OnceLock<T> {
    is_set: AtomicBool,
    value: std::sync::OnceLock<T>,
}

impl<T> OnceLock<T> {
    pub(crate) fn new() -> Self {
        Self {
            is_set: AtomicBool::new(false),
            value: std::sync::OnceLock::new(),
        }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        let is_set = self.is_set.load(Ordering::Acquire);
        is_set.then(|| self.value.get().unwrap())
    }

    pub(crate) fn set(&self, value: T) -> Result<(), T> {
        self.value.set(value)?;
        self.is_set.store(true, Ordering::Release);
        Ok(())
    }
}

/// Bounded channels, as crossbeam has them; an operation on one is one step.
pub(crate) mod channel {
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::sync::Mutex as Plain;
    use std::time::Duration;

    use super::{Condvar, Mutex, MutexGuard};

    loom::lazy_static! {
        /// Held for each operation on any channel, so that a select sees them all at once.
        static ref CHANNELS: (Mutex<()>, Condvar) = (Mutex::new(()), Condvar::new());
    }

    /// The right to operate on channels.
    pub(crate) struct Turn(MutexGuard<'static, ()>);

    impl Turn {
        pub(crate) fn new() -> Self {
            Self(CHANNELS.0.lock().unwrap())
        }

        /// Waits until some channel has changed.
        pub(crate) fn next(self) -> Self {
            Self(CHANNELS.1.wait(self.0).unwrap())
        }

        fn changed(&self) {
            CHANNELS.1.notify_all();
        }
    }

    #[derive(Debug)]
    struct Shared<T> {
        capacity: usize,
        state: Plain<State<T>>,
    }

    #[derive(Debug)]
    struct State<T> {
        messages: VecDeque<T>,
        senders: usize,
        receivers: usize,
    }

    #[derive(Debug)]
    pub(crate) struct Sender<T>(Arc<Shared<T>>);

    #[derive(Debug)]
    pub(crate) struct Receiver<T>(Arc<Shared<T>>);

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Disconnected;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum TrySendError<T> {
        Full(T),
        Disconnected(T),
    }

    impl<T> TrySendError<T> {
        pub(crate) fn into_inner(self) -> T {
            match self {
                Self::Full(message) | Self::Disconnected(message) => message,
            }
        }
    }

    /// Without capacity a message is only ever taken by a receiver that waits for it. None ever
    /// waits here when somebody tries to send: it is as if it had not come yet.
    pub(crate) fn bounded<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
        let shared = Arc::new(Shared {
            capacity,
            state: Plain::new(State {
                messages: VecDeque::new(),
                senders: 1,
                receivers: 1,
            }),
        });
        (Sender(shared.clone()), Receiver(shared))
    }

    impl<T> Sender<T> {
        pub(crate) fn try_send(&self, message: T) -> Result<(), TrySendError<T>> {
            let turn = Turn::new();
            let mut state = self.0.state.lock().unwrap();
            if state.receivers == 0 {
                return Err(TrySendError::Disconnected(message));
            }
            if state.messages.len() >= self.0.capacity {
                return Err(TrySendError::Full(message));
            }
            state.messages.push_back(message);
            drop(state);
            turn.changed();
            Ok(())
        }

        /// No model lets a sender wait for room: that is a bug in what is modelled.
        pub(crate) fn send(&self, message: T) -> Result<(), Disconnected> {
            match self.try_send(message) {
                Ok(()) => Ok(()),
                Err(TrySendError::Disconnected(_)) => Err(Disconnected),
                Err(TrySendError::Full(_)) => panic!("a sender waits for room"),
            }
        }

        pub(crate) fn len(&self) -> usize {
            let _turn = Turn::new();
            self.0.state.lock().unwrap().messages.len()
        }
    }

    impl<T> Receiver<T> {
        /// Takes a message if there is one, or the news that none comes any more.
        pub(crate) fn poll(&self, _turn: &Turn) -> Option<Result<T, Disconnected>> {
            let mut state = self.0.state.lock().unwrap();
            match state.messages.pop_front() {
                Some(message) => Some(Ok(message)),
                None => (state.senders == 0).then_some(Err(Disconnected)),
            }
        }

        pub(crate) fn recv(&self) -> Result<T, Disconnected> {
            let mut turn = Turn::new();
            loop {
                match self.poll(&turn) {
                    Some(result) => return result,
                    None => turn = turn.next(),
                }
            }
        }

        pub(crate) fn recv_timeout(&self, _timeout: Duration) -> Result<T, Disconnected> {
            self.recv()
        }

        pub(crate) fn try_recv(&self) -> Result<T, Disconnected> {
            self.poll(&Turn::new()).unwrap_or(Err(Disconnected))
        }

        pub(crate) fn try_iter(&self) -> impl Iterator<Item = T> + '_ {
            std::iter::from_fn(|| self.try_recv().ok())
        }

        pub(crate) fn len(&self) -> usize {
            let _turn = Turn::new();
            self.0.state.lock().unwrap().messages.len()
        }
    }

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            self.0.state.lock().unwrap().senders += 1;
            Self(self.0.clone())
        }
    }

    impl<T> Clone for Receiver<T> {
        fn clone(&self) -> Self {
            self.0.state.lock().unwrap().receivers += 1;
            Self(self.0.clone())
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            // The count itself needs no turn: no step of the model comes between.
            let last = self.0.state.lock().unwrap().senders == 1;
            let turn = (last && !std::thread::panicking()).then(Turn::new);
            self.0.state.lock().unwrap().senders -= 1;
            if let Some(turn) = turn {
                turn.changed();
            }
        }
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            self.0.state.lock().unwrap().receivers -= 1;
        }
    }

    /// Takes the first of the messages that is there.
    macro_rules! select {
        ($(recv($receiver:expr) -> $message:pat => $body:expr),+ $(,)?) => {{
            let mut turn = $crate::sync::channel::Turn::new();
            loop {
                $(if let Some(message) = ($receiver).poll(&turn) {
                    drop(turn);
                    let $message = message;
                    break $body;
                })+
                turn = turn.next();
            }
        }};
    }
    pub(crate) use select;
}
