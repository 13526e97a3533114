//! Power cuts and failing disks while an image is written: it is whole or absent, and the image
//! before it is intact.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::io;
use std::path::Path;
use std::sync::Arc;

use common::{SampleGuest, facts};
use livepoint::store::backend::forgetful::{Faults, ForgetfulStorage, Survival};
use livepoint::store::{
    Codec, ImageReader, ImageWriter, StoreError, WriteOptions, chain_images, replace_domain_xml,
};

const DIR: &str = "/chain";

/// Arbitrary survivors of each cut, beside nothing and everything.
const SEEDS: u64 = 6;

fn disk() -> ForgetfulStorage {
    ForgetfulStorage::new(&[Path::new(DIR)])
}

fn write(storage: &ForgetfulStorage, path: &Path, guest: &SampleGuest) -> Result<(), StoreError> {
    let options = WriteOptions {
        codec: Codec::Lz4,
        ..WriteOptions::default()
    };
    let storage = Arc::new(storage.clone());
    let writer = ImageWriter::create(storage, path, &guest.regions(), &options)?;
    guest.write_to(&writer)?;
    writer.commit(facts()).map(drop)
}

/// Checks that the image at `path` holds exactly `guest`.
fn assert_holds(storage: &ForgetfulStorage, path: &Path, guest: &SampleGuest) {
    let reader = ImageReader::open(storage, path).unwrap();
    reader.verify(1).unwrap();
    guest.assert_equals(&reader);
}

fn survivals() -> impl Iterator<Item = Survival> {
    [Survival::Nothing, Survival::Everything]
        .into_iter()
        .chain((1..=SEEDS).map(Survival::Some))
}

/// Number of operations that writing `guest` to `path` takes.
fn operation_count(path: &Path, before: &ForgetfulStorage, guest: &SampleGuest) -> u64 {
    let storage = before.crash(Survival::Everything);
    storage.set_faults(Faults::default());
    write(&storage, path, guest).unwrap();
    storage.operations().len() as u64
}

#[test]
fn a_chain_cut_at_any_operation_keeps_its_images_and_has_the_new_one_whole_or_not() {
    let dir = Path::new(DIR);
    let (old, new) = (SampleGuest::new(1), SampleGuest::new(2));
    let before = disk();
    write(&before, dir, &old).unwrap();
    let operations = operation_count(dir, &before, &new);
    let mut seen = [0_u32; 2];
    for cut_at in 0..operations {
        let storage = before.crash(Survival::Everything);
        storage.set_faults(Faults {
            cut_at: Some(cut_at),
            ..Faults::default()
        });
        assert!(write(&storage, dir, &new).is_err(), "cut at {cut_at}");
        for survival in survivals() {
            let after = storage.crash(survival);
            let images = chain_images(&after, dir).unwrap();
            assert_holds(&after, &images[0].path, &old);
            match images.as_slice() {
                [_] => seen[0] += 1,
                [_, image] => {
                    seen[1] += 1;
                    assert_holds(&after, &image.path, &new);
                }
                more => panic!("{more:?} after a cut at {cut_at}, {survival:?}"),
            }
            // The next writer clears up and goes on.
            write(&after, dir, &new).unwrap();
            assert_holds(&after, dir, &new);
            let names = livepoint::store::Storage::list(&after, dir).unwrap();
            assert_eq!(names.len(), images.len() + 1, "{names:?}");
        }
    }
    assert!(
        seen.iter().all(|&count| count > 0),
        "both ends were seen: {seen:?}"
    );
}

#[test]
fn a_replaced_image_is_the_old_or_the_new_one_after_a_cut_at_any_operation() {
    let path = Path::new(DIR).join("vm.lpi");
    let (old, new) = (SampleGuest::new(1), SampleGuest::new(2));
    let before = disk();
    write(&before, &path, &old).unwrap();
    let mut seen = [0_u32; 2];
    for cut_at in 0..operation_count(&path, &before, &new) {
        let storage = before.crash(Survival::Everything);
        storage.set_faults(Faults {
            cut_at: Some(cut_at),
            ..Faults::default()
        });
        assert!(write(&storage, &path, &new).is_err(), "cut at {cut_at}");
        for survival in survivals() {
            let after = storage.crash(survival);
            let reader = ImageReader::open(&after, &path).unwrap();
            reader.verify(1).unwrap();
            let is_new = new.equals(&reader);
            seen[usize::from(is_new)] += 1;
            if !is_new {
                old.assert_equals(&reader);
            }
        }
    }
    assert!(
        seen.iter().all(|&count| count > 0),
        "both ends were seen: {seen:?}"
    );
}

#[test]
fn a_committed_image_survives_a_cut_at_once() {
    let storage = disk();
    let guest = SampleGuest::new(3);
    write(&storage, Path::new(DIR), &guest).unwrap();
    for survival in survivals() {
        assert_holds(&storage.crash(survival), Path::new(DIR), &guest);
    }
}

#[test]
fn a_commit_syncs_the_file_then_renames_then_syncs_the_directory() {
    let storage = disk();
    let path = Path::new(DIR).join("vm.lpi");
    write(&storage, &path, &SampleGuest::new(4)).unwrap();
    let operations = storage.operations();
    let (before, end) = operations.split_at(operations.len() - 3);
    assert_eq!(
        end,
        [
            "sync .file-vm.lpi.lpi-part",
            "rename to vm.lpi",
            "sync-dir chain"
        ]
    );
    assert_eq!(before[0], "create .file-vm.lpi.lpi-part");
    assert!(
        before[1..]
            .iter()
            .all(|operation| operation == "write .file-vm.lpi.lpi-part"),
        "{before:?}"
    );
}

#[test]
fn any_one_failing_operation_leaves_the_old_image_and_no_other_file() {
    let path = Path::new(DIR).join("vm.lpi");
    let (old, new) = (SampleGuest::new(1), SampleGuest::new(2));
    let before = disk();
    write(&before, &path, &old).unwrap();
    let operations = operation_count(&path, &before, &new);
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::Other] {
        for fail_at in 0..operations {
            let storage = before.crash(Survival::Everything);
            storage.set_faults(Faults {
                fail_at: Some((fail_at, kind)),
                ..Faults::default()
            });
            let error = write(&storage, &path, &new).unwrap_err();
            assert_eq!(error.is_no_space(), kind == io::ErrorKind::StorageFull);
            let names = livepoint::store::Storage::list(&storage, Path::new(DIR)).unwrap();
            assert_eq!(names, ["vm.lpi"], "operation {fail_at} failed");
            // The directory's sync is the last: the new image is in place, and whole.
            let guest = if fail_at == operations - 1 {
                &new
            } else {
                &old
            };
            assert_holds(&storage, &path, guest);
        }
    }
}

#[test]
fn short_writes_are_continued() {
    let storage = disk();
    storage.set_faults(Faults {
        write_bytes_max: Some(1000),
        ..Faults::default()
    });
    let guest = SampleGuest::new(5);
    write(&storage, Path::new(DIR), &guest).unwrap();
    assert_holds(&storage, Path::new(DIR), &guest);
}

#[test]
fn an_image_that_cannot_fit_is_refused_before_it_is_begun() {
    let storage = disk();
    storage.set_faults(Faults {
        capacity: Some(1 << 20),
        ..Faults::default()
    });
    let guest = SampleGuest::new(6);
    let options = WriteOptions {
        expected_bytes: Some(2 << 20),
        ..WriteOptions::default()
    };
    let error = ImageWriter::create(
        Arc::new(storage.clone()),
        Path::new(DIR),
        &guest.regions(),
        &options,
    )
    .unwrap_err();
    assert!(matches!(
        error,
        StoreError::NoSpace {
            needed: 0x20_0000,
            available: 0x10_0000,
            ..
        }
    ));
    assert!(storage.operations().is_empty());
}

#[test]
fn an_image_whose_document_is_replaced_has_the_old_or_the_new_one_after_a_cut_at_any_operation() {
    let path = Path::new(DIR).join("vm.lpi");
    let guest = SampleGuest::new(1);
    let before = disk();
    write(&before, &path, &guest).unwrap();
    let replace = |storage: &ForgetfulStorage| {
        replace_domain_xml(storage, &path, "<domain>another</domain>", |_| Ok(()))
    };
    let document = |storage: &ForgetfulStorage| {
        // All but the document is as it was, and covered by its digests.
        assert_holds(storage, &path, &guest);
        let reader = ImageReader::open(storage, &path).unwrap();
        reader.manifest().guest.domain_xml.clone()
    };
    let old = document(&before);
    let whole = before.crash(Survival::Everything);
    whole.set_faults(Faults::default());
    replace(&whole).unwrap();
    assert_eq!(
        document(&whole.crash(Survival::Nothing)),
        "<domain>another</domain>"
    );
    let mut seen = [0_u32; 2];
    for cut_at in 0..whole.operations().len() as u64 {
        let storage = before.crash(Survival::Everything);
        storage.set_faults(Faults {
            cut_at: Some(cut_at),
            ..Faults::default()
        });
        assert!(replace(&storage).is_err(), "cut at {cut_at}");
        for survival in survivals() {
            let after = storage.crash(survival);
            seen[usize::from(document(&after) != old)] += 1;
            // What a cut has left is in nobody's way.
            replace(&after).unwrap();
            let names = livepoint::store::Storage::list(&after, Path::new(DIR)).unwrap();
            assert_eq!(names, ["vm.lpi"]);
        }
    }
    assert!(
        seen.iter().all(|&count| count > 0),
        "both ends were seen: {seen:?}"
    );
}

#[test]
fn a_document_is_not_replaced_in_what_is_no_image_or_in_use_or_where_its_user_cannot_be_prepared() {
    let dir = Path::new(DIR);
    let path = dir.join("vm.lpi");
    let guest = SampleGuest::new(1);
    let storage = disk();
    write(&storage, &path, &guest).unwrap();
    let xml = "<domain>another</domain>";
    let done = || Ok(());
    let named = replace_domain_xml(&storage, dir, xml, |_| done()).unwrap_err();
    assert!(named.to_string().contains("not a file"), "{named}");
    let missing = dir.join("missing.lpi");
    replace_domain_xml(&storage, &missing, xml, |_| done()).unwrap_err();
    let reader = ImageReader::open(&storage, &path).unwrap();
    let busy = replace_domain_xml(&storage, &path, xml, |_| done()).unwrap_err();
    assert!(matches!(busy, StoreError::InUse { .. }), "{busy}");
    drop(reader);
    let refuse = |_: &Path| Err(io::ErrorKind::PermissionDenied.into());
    replace_domain_xml(&storage, &path, xml, refuse).unwrap_err();
    let huge = "x".repeat(5 << 20);
    replace_domain_xml(&storage, &path, &huge, |_| done()).unwrap_err();
    assert_holds(&storage, &path, &guest);
    let reader = ImageReader::open(&storage, &path).unwrap();
    assert_ne!(reader.manifest().guest.domain_xml, xml);
    let names = livepoint::store::Storage::list(&storage, dir).unwrap();
    assert_eq!(names, ["vm.lpi"]);
}
