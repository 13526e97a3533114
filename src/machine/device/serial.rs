//! A 16550 serial port.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, SerialState};

use super::backend::{Backend, REOPEN_INTERVAL, Received, STALL_MAX, Sent, wait_until_read};
use super::{BackendError, Device, DrainTimeout, IrqLine, Quiesce};
use crate::machine::bus::{GuestRequest, Registers};
use crate::machine::spec::SerialSpec;
use crate::state::device::SerialV1;
use crate::state::{SectionPayload, StateError, StateSection, StateSet};
use crate::sys::sigmask::SignalsBlocked;

/// First port and interrupt line of COM1 to COM4.
pub const ADDRESSES: [(u64, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];
/// How many I/O ports a serial port takes.
pub const PORTS: u64 = 8;

/// Output that waits for its reader, at most.
const QUEUE_BYTES_MAX: usize = 64 << 10;

/// Bytes of the receive FIFO.
const FIFO_BYTES: usize = 64;

/// What the guest wrote during one exit.
#[derive(Debug, Default)]
struct Written(Vec<u8>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Wakes the input thread when the guest has emptied its FIFO.
#[derive(Clone, Debug)]
struct WakeWhenEmpty(Arc<OwnedFd>);

impl SerialEvents for WakeWhenEmpty {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        wake(&self.0);
    }
}

fn wake(event: &OwnedFd) {
    // Fails only where the counter is full, and then the thread is awake already.
    let _already_awake = rustix::io::write(event, &1_u64.to_ne_bytes());
}

type Uart = Serial<IrqLine, WakeWhenEmpty, Written>;

/// The host's side of a port.
#[derive(Debug)]
struct Line {
    backend: Backend,
    queue: VecDeque<u8>,
    paused: bool,
    ended: bool,
    /// A vCPU has waited for this reader in vain.
    stalled: bool,
    lost_bytes: u64,
}

/// A serial port.
pub struct SerialPort {
    number: u32,
    irq: IrqLine,
    uart: Mutex<Uart>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the port's thread shares with it. Locks are taken in the order uart, line.
#[derive(Debug)]
struct Shared {
    line: Mutex<Line>,
    changed: Condvar,
    wake: Arc<OwnedFd>,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, but no longer than `time`.
    fn wait<'a>(&self, line: MutexGuard<'a, Line>, time: Duration) -> MutexGuard<'a, Line> {
        let waited = self.changed.wait_timeout(line, time);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Sends what is queued, as far as it goes. Called with the line locked and not paused.
    fn send_queued(&self, line: &mut Line) {
        while !line.queue.is_empty() {
            let (front, _) = line.queue.as_slices();
            match line.backend.send(front) {
                Sent::Bytes(sent) => {
                    line.queue.drain(..sent);
                }
                Sent::Full => break,
                Sent::Discarded => line.queue.clear(),
            }
            line.stalled = false;
            self.changed.notify_all();
        }
    }
}

/// The host's end of a serial port.
#[derive(Debug)]
pub(in crate::machine) struct OpenedSerial {
    port: u32,
    backend: Backend,
}

impl OpenedSerial {
    /// Opens it.
    pub(in crate::machine) fn new(spec: &SerialSpec) -> Result<Self, BackendError> {
        Ok(Self {
            port: spec.port,
            backend: Backend::open(&spec.backend)?,
        })
    }

    /// Returns the port's number.
    pub(in crate::machine) fn port(&self) -> u32 {
        self.port
    }
}

impl SerialPort {
    /// Starts the thread that serves the backend, paused: input that came before a saved state
    /// would be lost in it.
    pub(in crate::machine) fn new(
        opened: OpenedSerial,
        irq: IrqLine,
    ) -> Result<Arc<Self>, BackendError> {
        let OpenedSerial {
            port: number,
            backend,
        } = opened;
        let needs_thread = backend.needs_thread();
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map(Arc::new)
            .map_err(|error| BackendError::new("make an eventfd")(error.into()))?;
        let shared = Arc::new(Shared {
            line: Mutex::new(Line {
                backend,
                queue: VecDeque::new(),
                paused: true,
                ended: false,
                stalled: false,
                lost_bytes: 0,
            }),
            changed: Condvar::new(),
            wake: wake.clone(),
        });
        let uart = Serial::with_events(irq.clone(), WakeWhenEmpty(wake), Written::default());
        let port = Arc::new(Self {
            number,
            irq,
            uart: Mutex::new(uart),
            shared,
            thread: Mutex::new(None),
        });
        if needs_thread {
            let served = Arc::downgrade(&port);
            let shared = port.shared.clone();
            let _blocked = SignalsBlocked::new();
            let thread = thread::Builder::new()
                .name(format!("lvp-serial-{number}"))
                .spawn(move || serve(&shared, &served))
                .map_err(BackendError::new("start a serial port's thread"))?;
            *port.lock_thread() = Some(thread);
        }
        Ok(port)
    }

    /// Returns the port's number, from 0 for COM1.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Returns the terminal, file or socket of the host, where there is one.
    pub fn path(&self) -> Option<PathBuf> {
        self.shared.lock().backend.path().map(Into::into)
    }

    /// Returns how many bytes of output were dropped because their reader did not read.
    pub fn lost_bytes(&self) -> u64 {
        self.shared.lock().lost_bytes
    }

    /// Waits until what the guest wrote has gone out, and who has the terminal open has read it, or
    /// until `deadline`.
    pub fn flush_until(&self, deadline: Instant) {
        let is_terminal = self.send_until(deadline).backend.is_terminal();
        if is_terminal {
            wait_until_read(deadline, || self.shared.lock().backend.is_unread());
        }
    }

    fn send_until(&self, deadline: Instant) -> MutexGuard<'_, Line> {
        let mut line = self.shared.lock();
        loop {
            if !line.paused {
                self.shared.send_queued(&mut line);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if line.queue.is_empty() || left.is_zero() {
                return line;
            }
            wake(&self.shared.wake);
            line = self.shared.wait(line, left);
        }
    }

    fn lock_uart(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_thread(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends or queues `bytes`; waits at most [`STALL_MAX`], and once for each time that the
    /// reader stops.
    fn put(&self, bytes: &[u8]) {
        let mut line = self.shared.lock();
        line.queue.extend(bytes);
        if !line.paused {
            self.shared.send_queued(&mut line);
        }
        if line.queue.is_empty() {
            return;
        }
        wake(&self.shared.wake);
        if line.queue.len() > QUEUE_BYTES_MAX && !line.stalled {
            line = self
                .shared
                .changed
                .wait_timeout_while(line, STALL_MAX, |line| {
                    line.queue.len() > QUEUE_BYTES_MAX && !line.ended
                })
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            line.stalled = line.queue.len() > QUEUE_BYTES_MAX;
        }
        let excess = line.queue.len().saturating_sub(QUEUE_BYTES_MAX);
        if excess > 0 {
            line.queue.truncate(QUEUE_BYTES_MAX);
            line.lost_bytes += excess as u64;
        }
    }

    fn fresh(&self, state: &SerialState) -> Result<Uart, vm_superio::serial::Error<io::Error>> {
        Serial::from_state(
            state,
            self.irq.clone(),
            WakeWhenEmpty(self.shared.wake.clone()),
            Written::default(),
        )
    }
}

impl Drop for SerialPort {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        wake(&self.shared.wake);
        let thread = self.lock_thread().take();
        // The thread itself may hold the last reference for a moment; it ends by itself then.
        if let Some(thread) = thread.filter(|it| it.thread().id() != thread::current().id())
            && thread.join().is_err()
        {
            log::error!("the thread of serial port {} panicked", self.number);
        }
    }
}

/// Moves bytes between the backend and the port until the port is gone.
///
/// Input is taken only when the FIFO has room; else it waits with the sender.
fn serve(shared: &Shared, port: &Weak<SerialPort>) {
    loop {
        let Some(has_room) = port
            .upgrade()
            .map(|port| port.lock_uart().fifo_capacity() > 0)
        else {
            return;
        };
        let line = shared
            .changed
            .wait_while(shared.lock(), |line| line.paused && !line.ended)
            .unwrap_or_else(PoisonError::into_inner);
        if line.ended {
            return;
        }
        let fds = line.backend.poll_for(has_room, !line.queue.is_empty());
        drop(line);
        wait_for(&fds, &shared.wake);
        let Some(port) = port.upgrade() else { return };
        move_bytes(shared, &port);
    }
}

/// Waits until one of `fds` is ready or somebody calls; a while at most where there is none.
fn wait_for(fds: &[(Arc<OwnedFd>, PollFlags)], woken: &OwnedFd) {
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .map(|(fd, flags)| PollFd::new(fd, *flags))
        .collect();
    polled.push(PollFd::new(woken, PollFlags::IN));
    let interval = Timespec::try_from(REOPEN_INTERVAL).expect("a short time fits");
    let timeout = fds.is_empty().then_some(&interval);
    if let Err(error) = poll(&mut polled, timeout) {
        log::debug!("polling a serial port's backend: {error}");
    }
    // Nothing to take where nobody called.
    let _count = rustix::io::read(woken, &mut [0; 8]);
}

/// Moves what can be moved now; nothing while the port is paused.
fn move_bytes(shared: &Shared, port: &SerialPort) {
    // Both locks over all of it: a pause then finds each byte in the backend or in the FIFO.
    let mut uart = port.lock_uart();
    let mut line = shared.lock();
    if line.paused || line.ended {
        return;
    }
    line.backend.accept();
    shared.send_queued(&mut line);
    let mut buffer = [0; FIFO_BYTES];
    let room = uart.fifo_capacity().min(FIFO_BYTES);
    if room == 0 {
        return;
    }
    if let Received::Bytes(bytes) = line.backend.receive(&mut buffer[..room])
        && let Err(error) = uart.enqueue_raw_bytes(&buffer[..bytes])
    {
        log::warn!("serial input of port {} is lost: {error}", port.number);
    }
}

impl Registers for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = self.lock_uart();
        for (at, byte) in (offset..).zip(data) {
            *byte = u8::try_from(at).map_or(0xff, |at| uart.read(at));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<GuestRequest> {
        let mut uart = self.lock_uart();
        for (at, &byte) in (offset..).zip(data) {
            let Ok(at) = u8::try_from(at) else { continue };
            if let Err(error) = uart.write(at, byte) {
                log::warn!("serial port {}: {error}", self.number);
            }
        }
        None
    }

    fn flush(&self) {
        let written = mem::take(&mut self.lock_uart().writer_mut().0);
        if !written.is_empty() {
            self.put(&written);
        }
    }
}

impl Quiesce for SerialPort {
    fn pause(&self) {
        // The UART's lock first: bytes on their way from the backend to the FIFO arrive.
        let _uart = self.lock_uart();
        self.shared.lock().paused = true;
    }

    fn drain(&self, _deadline: Instant) -> Result<(), DrainTimeout> {
        // Whatever touches the backend does so under the line's lock and never blocks there, so
        // nothing is in flight once `pause` has had the lock.
        Ok(())
    }

    fn resume(&self) {
        let mut line = self.shared.lock();
        line.paused = false;
        self.shared.send_queued(&mut line);
        self.shared.changed.notify_all();
        wake(&self.shared.wake);
    }
}

impl Device for SerialPort {
    fn name(&self) -> String {
        format!("serial.{}", self.number)
    }

    fn save(&self) -> Vec<StateSection> {
        let state = self.lock_uart().state();
        let saved = SerialV1 {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        };
        vec![StateSection::encode(self.number, &saved)]
    }

    fn restore(&self, state: &mut StateSet) -> Result<(), StateError> {
        let saved: SerialV1 = state.take(self.number)?;
        let state = SerialState {
            baud_divisor_low: saved.divisor_low,
            baud_divisor_high: saved.divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.received,
        };
        let fresh = self.fresh(&state).map_err(|error| {
            log::warn!("serial port {}: {error}", self.number);
            StateError::Malformed {
                kind: SerialV1::KIND,
                instance: self.number,
                source: None,
            }
        })?;
        *self.lock_uart() = fresh;
        Ok(())
    }

    fn reset(&self) {
        match self.fresh(&SerialState::default()) {
            Ok(fresh) => *self.lock_uart() = fresh,
            Err(error) => log::warn!("serial port {}: {error}", self.number),
        }
    }
}
