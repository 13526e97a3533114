//! `kill -9` at random moments of a checkpoint: the new image is whole, or it is not there, and
//! the one before it is as it was.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::victim::{Victim, images_in};
use common::{Random, have_kvm, long};
use livepoint::host::{CheckpointRequest, Image, Protocol};

fn request(protocol: Protocol, out: &Path) -> CheckpointRequest {
    let mut request = CheckpointRequest::new(protocol);
    request.out = Some(out.to_owned());
    request
}

/// Returns the images in a directory, each checked in full, with its root digest.
fn images(dir: &Path) -> Vec<(PathBuf, String)> {
    let checked = |path: PathBuf| {
        let image = Image::open(&path).unwrap_or_else(|error| panic!("{error:?}"));
        (path, image.verify().unwrap().root_digest)
    };
    images_in(dir).into_iter().map(checked).collect()
}

#[derive(Debug, Default)]
struct Outcomes {
    absent: u32,
    whole: u32,
}

/// Kills `count` victims, each at a random moment of a checkpoint to `out`.
fn kill_all(protocol: Protocol, count: u32, to_one_file: bool, random: &mut Random) -> Outcomes {
    let dir = tempfile::tempdir().unwrap();
    let chain = dir.path().join("images");
    fs::create_dir(&chain).unwrap();
    let out = if to_one_file {
        chain.join("only.lpi")
    } else {
        chain.clone()
    };
    let mut outcomes = Outcomes::default();
    // How long a checkpoint takes, to choose moments within and a little after it.
    let mut length = Duration::from_millis(500);
    for _ in 0..count {
        let victim = Victim::run(dir.path(), 128, 30);
        let mut client = victim.client();
        if images(&chain).is_empty() {
            let start = Instant::now();
            let job = client.start_checkpoint(request(protocol, &out)).unwrap();
            client.wait(job, |_| ()).unwrap();
            length = start.elapsed();
        }
        let before = images(&chain);
        client.start_checkpoint(request(protocol, &out)).unwrap();
        let most = u64::try_from(length.as_micros()).unwrap() * 5 / 4;
        std::thread::sleep(Duration::from_micros(random.below(most)));
        victim.kill();
        let after = images(&chain);
        if after == before {
            outcomes.absent += 1;
        } else {
            outcomes.whole += 1;
            assert_eq!(after.len(), before.len() + usize::from(!to_one_file));
            if !to_one_file {
                assert!(
                    before.iter().all(|image| after.contains(image)),
                    "an older image changed"
                );
            }
        }
        // Keeps the directory small; the newest one stays as "the one before".
        for (path, _) in after.iter().rev().skip(1) {
            fs::remove_file(path).unwrap();
        }
    }
    outcomes
}

#[test]
fn a_killed_checkpoint_leaves_a_whole_image_or_none_and_the_one_before() {
    if !have_kvm() {
        return;
    }
    let mut random = Random::new(2011);
    let each = if long() { 60 } else { 12 };
    for protocol in Protocol::CAPTURING {
        for to_one_file in [false, true] {
            let outcomes = kill_all(protocol, each, to_one_file, &mut random);
            println!("{protocol}, to one file: {to_one_file}: {outcomes:?}");
            assert!(outcomes.absent > 0, "no kill came in time: {outcomes:?}");
        }
    }
}

#[test]
fn what_a_killed_writer_left_is_removed_by_the_next_one() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let chain = dir.path().join("images");
    fs::create_dir(&chain).unwrap();
    let victim = Victim::run(dir.path(), 128, 30);
    victim
        .client()
        .start_checkpoint(request(Protocol::Threaded, &chain))
        .unwrap();
    std::thread::sleep(Duration::from_millis(30));
    victim.kill();
    let second = Victim::run(dir.path(), 128, 30);
    let mut client = second.client();
    let job = client
        .start_checkpoint(request(Protocol::Threaded, &chain))
        .unwrap();
    client.wait(job, |_| ()).unwrap();
    second.kill();
    let names: Vec<_> = fs::read_dir(&chain)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    let images = names
        .iter()
        .filter(|name| name.to_string_lossy().ends_with(".lpi"))
        .count();
    assert_eq!(images, names.len(), "only images are left: {names:?}");
}
