//! The guests that come with the program: small machines that compute, write
//! memory, or answer on the serial line, and that say themselves whether they
//! are right. See `guests/README.md`.

/// A guest in the executable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuiltinGuest {
    /// What [`find`] knows it by.
    pub name: &'static str,
    /// What it does, in a few words.
    pub about: &'static str,
    /// An x86-64 ELF image, to be started by the 64-bit Linux boot protocol
    /// (at its entry point) or by PVH (at the address in its note).
    pub elf: &'static [u8],
}

/// Every built-in guest.
pub const ALL: &[BuiltinGuest] = &[
    BuiltinGuest {
        name: "echo",
        about: "answers on the serial line; powers off at the power button",
        elf: include_bytes!(concat!(env!("OUT_DIR"), "/echo.elf")),
    },
    BuiltinGuest {
        name: "npb",
        about: "NAS Parallel Benchmarks CG, EP, FT, IS and MG, which verify their results",
        elf: include_bytes!(concat!(env!("OUT_DIR"), "/npb.elf")),
    },
    BuiltinGuest {
        name: "pagewriter",
        about: "writes memory at full speed, and measures its own outages",
        elf: include_bytes!(concat!(env!("OUT_DIR"), "/pagewriter.elf")),
    },
    BuiltinGuest {
        name: "virtio",
        about: "checks what it wrote to a virtio disk, or answers at virtio consoles",
        elf: include_bytes!(concat!(env!("OUT_DIR"), "/virtio.elf")),
    },
];

/// Returns the guest of that name, if there is one.
pub fn find(name: &str) -> Option<&'static BuiltinGuest> {
    ALL.iter().find(|guest| guest.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_is_found_by_its_name_and_nothing_else_is() {
        for guest in ALL {
            assert_eq!(find(guest.name), Some(guest));
        }
        assert_eq!(find("no such guest"), None);
    }
}
