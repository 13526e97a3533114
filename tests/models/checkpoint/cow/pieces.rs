//! Whoever captures a piece, the copy that counts holds no later store, and every writer gets
//! through.
//!
//! [`Scene::end`] has the checks. Each of these makes a model here fail: un-protecting before
//! finishing, or before copying; taking `TooLate` for `First`; a load and a store in place of the
//! compare-and-swap; not un-protecting what another thread captured; any weaker ordering in
//! `CapturedPieces`; telling the end at every piece, or at none; not passing on a hurry, or not
//! telling the sweep of the end.

use loom::thread;

use super::Scene;
use crate::guest::DiscardObserver;

/// The sweep and a handler race for the piece that a vCPU writes.
pub(crate) fn a_writer_races_the_sweep() {
    let scene = Scene::new(1, 2, 0);
    scene.memory[0].store(0, 1);
    scene.pause();
    let handler = scene.handler();
    let vcpu = scene.vcpu(|vcpu| vcpu.store(0, 2));
    scene.cow.sweep().unwrap();
    scene.end(&[1]);
    vcpu.join().unwrap();
    handler.join().unwrap();
}

/// So does a thread that writes what it captures; the first who waits ends that, and the sweep takes
/// over.
pub(crate) fn a_writer_races_a_thread_that_writes_through() {
    let scene = Scene::new(1, 3, 0);
    scene.memory[0].store(0, 1);
    scene.pause();
    let handler = scene.handler();
    let vcpu = scene.vcpu(|vcpu| vcpu.store(0, 2));
    scene.cow.write_through().unwrap();
    scene.cow.wait_for_hurry().unwrap();
    scene.cow.sweep().unwrap();
    scene.end(&[1]);
    vcpu.join().unwrap();
    handler.join().unwrap();
}

/// Nobody ever waits for a copy: the threads of the sweep, which wait for that, end all the same.
pub(crate) fn the_sweep_ends_without_a_hurry() {
    let scene = Scene::new(1, 2, 0);
    scene.memory[0].store(0, 1);
    scene.pause();
    let sweeps = [(); 2].map(|()| {
        let cow = scene.cow.clone();
        thread::spawn(move || {
            cow.wait_for_hurry().unwrap();
            cow.sweep().unwrap();
        })
    });
    scene.cow.write_through().unwrap();
    for sweep in sweeps {
        sweep.join().unwrap();
    }
    scene.end(&[1]);
}

/// So does a second handler, which hears of the same fault.
pub(crate) fn two_handlers_serve_one_writer() {
    let scene = Scene::new(1, 3, 0);
    scene.memory[0].store(0, 1);
    scene.pause();
    let handlers = [scene.handler(), scene.handler()];
    let vcpu = scene.vcpu(|vcpu| vcpu.store_told_twice(0, 2));
    scene.cow.sweep().unwrap();
    scene.end(&[1]);
    vcpu.join().unwrap();
    for handler in handlers {
        handler.join().unwrap();
    }
}

/// No handler comes to the vCPU: the sweep lets it go once its piece is captured, also where it
/// waits already.
pub(crate) fn the_sweep_lets_a_writer_go() {
    let scene = Scene::new(1, 2, 0);
    scene.memory[0].store(0, 1);
    scene.pause();
    let vcpu = scene.vcpu(|vcpu| vcpu.store(0, 2));
    scene.cow.sweep().unwrap();
    vcpu.join().unwrap();
    scene.end(&[1]);
}

/// A device gives a page back, which no protection keeps it from, while the sweep copies it.
pub(crate) fn a_discard_waits_for_the_copy() {
    discard(true);
}

/// Fails.
pub(crate) fn a_discard_that_is_not_announced_is_in_the_copy() {
    discard(false);
}

fn discard(announced: bool) {
    let scene = Scene::new(1, 2, 0);
    scene.memory[0].store(0, 1);
    scene.pause();
    let (cow, memory) = (scene.cow.clone(), scene.memory[0].clone());
    let run = scene.layout.regions()[0].run;
    let device = thread::spawn(move || {
        if announced {
            cow.before_discard(run);
        }
        memory.store_noted(0, 0);
    });
    scene.cow.sweep().unwrap();
    scene.end(&[1]);
    device.join().unwrap();
}

/// Two sweeps end at the same time. Who hears that all is captured gives memory up: the copies of
/// both must come before the stores that this lets through.
pub(crate) fn the_end_is_told_once_and_after_every_copy() {
    let scene = Scene::new(2, 2, 0);
    scene.memory[0].store(0, 1);
    scene.memory[1].store(0, 2);
    scene.pause();
    let cow = scene.cow.clone();
    let sweep = thread::spawn(move || cow.sweep().unwrap());
    let (cow, captured) = (scene.cow.clone(), scene.all_captured.clone());
    let session = thread::spawn(move || {
        captured.recv().unwrap();
        cow.protection().end();
    });
    let vcpu = scene.vcpu(|vcpu| vcpu.store(0, 3));
    scene.cow.sweep().unwrap();
    scene.end_told(&[1, 2], || session.join().unwrap());
    sweep.join().unwrap();
    vcpu.join().unwrap();
}
