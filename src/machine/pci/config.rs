//! The 256 bytes of configuration that describe a function and take the guest's settings.

/// Bytes of a function's configuration.
pub const CONFIG_BYTES: usize = 256;

/// Command register: answers to memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: may write memory and send interrupts.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: sends no legacy interrupts.
const COMMAND_INTX_OFF: u16 = 1 << 10;
/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;

const VENDOR: usize = 0x00;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// What a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor and device.
    pub id: (u16, u16),
    /// Revision.
    pub revision: u8,
    /// Class, subclass and interface, in the low 24 bits.
    pub class: u32,
    /// Vendor and device of the subsystem.
    pub subsystem: (u16, u16),
}

/// Configuration of one function: bytes, and which of their bits the guest may write.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    /// Where the next capability goes, and where the last one's link is.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    /// Makes a function of header type 0 without BAR and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            next: FIRST_CAPABILITY,
            link: CAPABILITIES,
        };
        space.put(VENDOR, &identity.id.0.to_le_bytes());
        space.put(VENDOR + 2, &identity.id.1.to_le_bytes());
        let class = u32::from(identity.revision) | identity.class << 8;
        space.put(REVISION, &class.to_le_bytes());
        space.put(SUBSYSTEM, &identity.subsystem.0.to_le_bytes());
        space.put(SUBSYSTEM + 2, &identity.subsystem.1.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_OFF;
        space.let_write(COMMAND, &command.to_le_bytes());
        space.let_write(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Adds BAR 0: 32-bit memory of `bytes` (a power of two), at `address`.
    pub fn with_bar(mut self, address: u32, bytes: u32) -> Self {
        assert!(bytes.is_power_of_two(), "a BAR's size is a power of two");
        self.put(BAR0, &address.to_le_bytes());
        // What cannot be written reads as zero, and tells the size to whoever writes ones.
        self.let_write(BAR0, &(!(bytes - 1)).to_le_bytes());
        self
    }

    /// Adds a capability with `id` whose bytes behind the link are `body`; returns where it is.
    /// The guest may write the bits that are set in `writable`, which starts where `body` does.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.let_write(at + 2, writable);
        self.put(self.link, &[u8::try_from(at).expect("256 bytes")]);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn let_write(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Reads from `at` on; all ones behind the end.
    pub fn read(&self, at: usize, data: &mut [u8]) {
        for (at, byte) in (at..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes those bits that the guest may write.
    pub fn write(&mut self, at: usize, data: &[u8]) {
        for (at, value) in (at..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    /// Returns two bytes.
    pub fn word(&self, at: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Returns four bytes.
    pub fn long(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Returns the command register.
    pub fn command(&self) -> u16 {
        self.word(COMMAND)
    }

    /// Sets the command register, as a write of the guest does.
    pub fn set_command(&mut self, command: u16) {
        self.write(COMMAND, &command.to_le_bytes());
    }

    /// Returns BAR 0.
    pub fn bar(&self) -> u32 {
        self.long(BAR0)
    }

    /// Sets BAR 0, as a write of the guest does.
    pub fn set_bar(&mut self, bar: u32) {
        self.write(BAR0, &bar.to_le_bytes());
    }

    /// Returns the interrupt line register.
    pub fn interrupt_line(&self) -> u8 {
        self.bytes[INTERRUPT_LINE]
    }

    /// Sets the interrupt line register.
    pub fn set_interrupt_line(&mut self, line: u8) {
        self.bytes[INTERRUPT_LINE] = line;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            id: (0x1af4, 0x1042),
            revision: 1,
            class: 0x01_0000,
            subsystem: (0x1af4, 0x1100),
        })
        .with_bar(0xc001_0000, 0x1_0000)
    }

    #[test]
    fn a_bar_written_with_ones_tells_its_size() {
        let mut space = space();
        assert_eq!(space.bar(), 0xc001_0000);
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(space.bar(), 0xffff_0000);
        space.write(BAR0, &0xd000_1234_u32.to_le_bytes());
        assert_eq!(space.bar(), 0xd000_0000);
    }

    #[test]
    fn identity_cannot_be_written_and_the_command_register_only_in_part() {
        let mut space = space();
        space.write(0, &[0xff; 16]);
        assert_eq!(space.long(0), 0x1042_1af4);
        assert_eq!(space.long(8), 0x0100_0001);
        assert_eq!(space.command(), 0x406);
        let mut beyond = [0; 4];
        space.read(254, &mut beyond);
        assert_eq!(beyond, [0, 0, 0xff, 0xff]);
    }

    #[test]
    fn capabilities_are_a_list_that_ends() {
        let mut space = space();
        assert_eq!(space.word(STATUS), 0);
        let first = space.add_capability(0x11, &[1; 10], &[0, 0xc0]);
        let second = space.add_capability(0x09, &[2; 14], &[]);
        assert_eq!(space.word(STATUS), STATUS_CAPABILITIES);
        assert_eq!(usize::from(space.word(CAPABILITIES) & 0xff), first);
        assert_eq!(
            space.word(first),
            u16::try_from(second << 8 | 0x11).unwrap()
        );
        assert_eq!(space.word(second), 0x0009);
        space.write(first + 2, &[0xff, 0xff]);
        assert_eq!(space.word(first + 2), 0xc101);
    }
}
