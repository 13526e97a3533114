//! The keyboard controller, of which only the reset line is there.

use crate::machine::bus::{GuestRequest, Registers};

/// Where its registers are: data, four ports that are not its own, and command.
pub const PORT: u64 = 0x60;
/// How many ports it takes.
pub const PORTS: u64 = 5;

/// Where the command register is, from [`PORT`] on.
pub const COMMAND: u64 = 4;
/// The command that resets the machine.
pub const PULSE_RESET: u8 = 0xfe;

/// Status: the output buffer is full, and the input buffer is not.
///
/// A driver that probes flushes the output buffer, never gets it empty, and concludes at once
/// that there is no controller; one that resets waits for the input buffer, and finds it empty.
const STATUS: u8 = 1;

/// The keyboard controller.
#[derive(Debug, Default)]
pub struct I8042;

impl Registers for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(match offset {
            0 => 0,
            COMMAND => STATUS,
            _ => 0xff,
        });
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<GuestRequest> {
        (offset == COMMAND && data == [PULSE_RESET]).then_some(GuestRequest::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        assert_eq!(I8042.write(4, &[0xfe]), Some(GuestRequest::Reset));
        assert_eq!(I8042.write(4, &[0xaa]), None);
        assert_eq!(I8042.write(0, &[0xfe]), None);
        let mut status = [0];
        I8042.read(4, &mut status);
        assert_eq!(status[0] & 2, 0, "ready for a command");
    }
}
