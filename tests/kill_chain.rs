//! `kill -9` on chains of increments: at random moments of an incremental checkpoint, of `gc` and of
//! `rebase`, every image that was there before and is kept is whole afterwards; and `gc` beside a
//! restore takes nothing from it.
#![cfg(feature = "cli")]
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::memory::read_page;
use common::pagewriter::assert_single_moment;
use common::victim::{Victim, images_in, livepoint};
use common::{Random, have_kvm, long, machine_memory};
use livepoint::host::{CheckpointRequest, Image, Protocol};
use livepoint::restore::eager;
use livepoint::store::{FileStorage, ImageReader};

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the guest from its start, or from an image of it.
fn start(dir: &Path, image: Option<&Path>) -> Victim {
    match image {
        Some(image) => Victim::restore(dir, image),
        None => Victim::run(dir, 64, 20),
    }
}

fn checkpoint(victim: &Victim, protocol: Protocol, out: &Path) -> PathBuf {
    let mut client = victim.client();
    let job = client.start_checkpoint(request(protocol, out)).unwrap();
    client.wait(job, |_| ()).unwrap().image
}

fn request(protocol: Protocol, out: &Path) -> CheckpointRequest {
    let mut request = CheckpointRequest::new(protocol);
    request.out = Some(out.to_owned());
    request.incremental = true;
    request
}

/// Checks every digest that a restore of the image needs, in its layers too; returns its root's.
///
/// Whoever was killed has let go of it soon, but not at once.
fn verified(image: &Path) -> String {
    let began = Instant::now();
    loop {
        match Image::open(image) {
            Ok(image) => return image.verify().unwrap().root_digest,
            Err(error) => assert!(began.elapsed() < PATIENCE, "{}", error.full_message()),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_killed_increment_leaves_every_image_of_its_chain_whole() {
    if !have_kvm() {
        return;
    }
    let mut random = Random::new(6);
    let kills = if long() { 25 } else { 3 };
    for protocol in Protocol::CAPTURING {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        fs::create_dir(&images).unwrap();
        let mut from = None;
        let mut whole = 0;
        for _ in 0..kills {
            // Each goes on from what the one before has left: the chain grows over crashes.
            let victim = start(dir.path(), from.as_deref());
            let began = Instant::now();
            checkpoint(&victim, protocol, &images);
            let length = began.elapsed();
            let before: Vec<_> = images_in(&images)
                .into_iter()
                .map(|path| (verified(&path), path))
                .collect();
            let mut client = victim.client();
            client.start_checkpoint(request(protocol, &images)).unwrap();
            let most = u64::try_from(length.as_micros()).unwrap().max(1);
            std::thread::sleep(Duration::from_micros(random.below(most)));
            drop(victim);
            for (root, path) in &before {
                assert_eq!(*root, verified(path), "{}", path.display());
            }
            let after = images_in(&images);
            assert!((before.len()..=before.len() + 1).contains(&after.len()));
            whole += after.len() - before.len();
            from = after.last().cloned();
            verified(from.as_deref().unwrap());
        }
        println!("{protocol}: {kills} kills, {whole} images whole, the others absent");
    }
}

/// Makes a chain of `length` images in `dir`.
fn make_chain(dir: &Path, length: usize) -> PathBuf {
    let images = dir.join("images");
    fs::create_dir(&images).unwrap();
    let victim = start(dir, None);
    for number in 0..length {
        let protocol = Protocol::CAPTURING[number % Protocol::CAPTURING.len()];
        checkpoint(&victim, protocol, &images);
        std::thread::sleep(Duration::from_millis(2));
    }
    images
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for file in images_in(from) {
        fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
    }
}

/// Runs a command and kills it after `after`, unless it has ended by then; returns whether it was.
fn killed_after(mut command: Command, after: Duration) -> bool {
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(after);
    let killed = child.try_wait().unwrap().is_none();
    drop(child.kill());
    child.wait().unwrap();
    killed
}

#[test]
fn a_killed_gc_or_rebase_leaves_what_is_kept_whole() {
    if !have_kvm() {
        return;
    }
    let mut random = Random::new(8);
    let turns = if long() { 60 } else { 8 };
    let dir = tempfile::tempdir().unwrap();
    let images = make_chain(dir.path(), 6);
    let all = images_in(&images);
    let roots: Vec<_> = all.iter().map(|path| verified(path)).collect();
    let run = dir.path().join("run");
    let mut kills = 0;
    for turn in 0..turns {
        let copy = dir.path().join(format!("copy-{turn}"));
        copy_dir(&images, &copy);
        let mut command = livepoint(&run);
        if turn % 2 == 0 {
            command.arg("gc").arg(&copy).args(["--keep", "2"]);
        } else {
            command.arg("rebase").arg(&copy).arg("--out").arg(&copy);
        }
        let after = Duration::from_micros(random.below(30_000) + random.below(30_000));
        kills += u32::from(killed_after(command, after));
        let kept = if turn % 2 == 0 { 2 } else { all.len() };
        for (path, root) in all.iter().zip(&roots).rev().take(kept) {
            let there = copy.join(path.file_name().unwrap());
            assert_eq!(verified(&there), *root, "{}", there.display());
        }
        // What is there beside them is whole too.
        verified(&copy);
        fs::remove_dir_all(&copy).unwrap();
    }
    println!("{kills} of {turns} killed in time");
}

/// Returns whether a process has a file open.
fn has_open(pid: u32, path: &Path) -> bool {
    let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    let path = path.canonicalize().unwrap();
    open.flatten()
        .any(|entry| fs::read_link(entry.path()).is_ok_and(|link| link == path))
}

#[test]
fn gc_beside_a_restore_takes_nothing_from_it() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let images = make_chain(dir.path(), 5);
    let run = dir.path().join("run");
    for lazy in [false, true] {
        let copy = dir.path().join(format!("copy-{lazy}"));
        copy_dir(&images, &copy);
        // An old one, which nothing that is kept may need.
        let old = images_in(&copy)[2].clone();
        // With `--track` it keeps the image open once it runs.
        let victim = Victim::start(dir.path(), Stdio::null(), |command| {
            command.args(["restore", "--track"]).arg(&old);
            lazy.then(|| command.arg("--lazy"));
            command
        });
        let began = Instant::now();
        while !has_open(victim.pid(), &old) {
            assert!(began.elapsed() < PATIENCE, "it does not open the image");
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut collections = 0;
        while collections < 3 || victim.try_client().is_none() {
            let mut gc = livepoint(&run);
            gc.arg("gc").arg(&copy).args(["--keep", "1"]);
            let output = gc.output().unwrap();
            assert!(output.status.success(), "{output:?}");
            collections += 1;
            assert!(
                began.elapsed() < PATIENCE,
                "the restore does not come to its end"
            );
        }
        let out = dir.path().join(format!("after-{lazy}.lpi"));
        let image = checkpoint(&victim, Protocol::Stop, &out);
        let reader = ImageReader::open(&FileStorage, &image).unwrap();
        let memory = machine_memory(&reader.manifest().regions, 0);
        eager::fill(&reader, &memory, &eager::FillOptions::default()).unwrap();
        let seen = assert_single_moment(|gpa, out| read_page(&memory, gpa, out), 7);
        assert!(seen.working_set_pages > 0);
        verified(&copy);
    }
}
