//! The library's version.

use std::ffi::c_char;

symbol_versions!("0.1":
    lvp_version,
    lvp_version_string,
);

/// Returns the version of the library that is running, as LVP_VERSION_NUMBER encodes it:
/// `major << 16 | minor << 8 | patch`.
///
/// Compare with LVP_VERSION_NUMBER to tell the header from the library. Does not block or fail.
/// Thread-safe.
///
/// Since: 0.1
#[unsafe(no_mangle)]
pub extern "C" fn lvp_version() -> u32 {
    let part = |text: &str| {
        text.parse::<u32>()
            .expect("Cargo checks that versions are numbers")
    };
    part(env!("CARGO_PKG_VERSION_MAJOR")) << 16
        | part(env!("CARGO_PKG_VERSION_MINOR")) << 8
        | part(env!("CARGO_PKG_VERSION_PATCH"))
}

/// Returns the version of the library that is running, as text such as "0.1.0".
///
/// Static; do not free. Does not block or fail. Thread-safe.
///
/// Since: 0.1
#[unsafe(no_mangle)]
pub extern "C" fn lvp_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
