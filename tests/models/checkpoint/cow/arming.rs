//! Memory is protected ahead of the pause: after it, every piece is protected or captured.
//!
//! A piece that is neither would take the store that follows the pause before it is copied.
//! [`Scene::end`] finds that. Each of these makes a model here fail: letting a writer through
//! without the lock, or not marking what he writes; collecting the marks before the switch;
//! not protecting what was written early; capturing early writes instead of letting them through;
//! fixing the moment after the switch.

use std::time::Duration;

use super::{Ahead, Scene};

/// A vCPU stores before, between and after; the pause comes at any point of it.
pub(crate) fn an_early_write_is_protected_again() {
    let scene = Scene::new(1, 2, 0);
    let handler = scene.handler();
    let vcpu = scene.vcpu(|vcpu| {
        vcpu.pass();
        vcpu.store(0, 1);
        vcpu.pass();
        vcpu.store(0, 2);
    });
    arm_and_end(scene);
    vcpu.join().unwrap();
    handler.join().unwrap();
}

/// A handler hears of the early write once more after it was let through, so that nobody waits
/// for that handler when the pause begins: it may act in the pause, or after it.
pub(crate) fn a_handler_comes_late_to_an_early_write() {
    let scene = Scene::new(1, 2, 0);
    let handler = scene.handler();
    let vcpu = scene.vcpu(|vcpu| {
        vcpu.store_told_twice(0, 1);
        vcpu.pass();
        vcpu.store(0, 2);
    });
    arm_and_end(scene);
    vcpu.join().unwrap();
    handler.join().unwrap();
}

/// Fails.
pub(crate) fn a_pause_that_waits_for_nobody_has_no_moment() {
    let scene = Scene::new(1, 2, 0);
    let handler = scene.handler();
    let vcpu = scene.vcpu(|vcpu| vcpu.store(0, 1));
    scene.gate.break_down();
    arm_and_end(scene);
    vcpu.join().unwrap();
    handler.join().unwrap();
}

/// What the session does: protects ahead, pauses, finishes, resumes, and here sweeps as well.
fn arm_and_end(mut scene: Scene) {
    let mut ahead = Ahead::new(scene.cow.clone(), scene.untouched(), Duration::ZERO);
    ahead.arm().unwrap();
    assert!(ahead.statistics().ahead);
    scene.gate.close();
    let at_moment = scene.memory[0].load(0);
    scene.stores_before = scene.memory[0].stores(0).len();
    ahead.finish_in_pause(None).unwrap();
    scene.gate.open();
    drop(ahead);
    scene.cow.sweep().unwrap();
    scene.end(&[at_moment]);
}
