//! The clock, driven by its registers.

use super::calendar::{DAY, HOURS, MINUTES, MONTH, SECONDS, WEEKDAY, YEAR};
use super::*;
use jiff::civil::DateTime;

const AFTERNOON: u8 = 0x80;

fn clock_with(offset_seconds: i64, after_restore: ClockPolicy, line: Line) -> Rtc {
    let spec = ClockSpec {
        rtc_offset_seconds: offset_seconds,
        after_restore,
        ..ClockSpec::default()
    };
    Rtc::new(&spec, line)
}

fn clock(offset_seconds: i64, after_restore: ClockPolicy) -> Rtc {
    clock_with(offset_seconds, after_restore, Box::new(|_| ()))
}

fn get(rtc: &Rtc, register: u8) -> u8 {
    let mut data = [0];
    rtc.write(0, &[register]);
    rtc.read(1, &mut data);
    data[0]
}

fn set(rtc: &Rtc, register: u8, value: u8) {
    rtc.write(0, &[register]);
    rtc.write(1, &[value]);
}

/// Sets the time as Linux does, and returns what is shown just after.
fn set_time(rtc: &Rtc, values: &[(u8, u8)]) {
    let status_b = get(rtc, STATUS_B);
    set(rtc, STATUS_B, status_b | B_SET);
    for (register, value) in values {
        set(rtc, *register, *value);
    }
    set(rtc, STATUS_B, status_b);
}

const LEAP_DAY: [(u8, u8); 7] = [
    (SECONDS, 0x30),
    (MINUTES, 0x59),
    (HOURS, 0x23),
    (DAY, 0x29),
    (MONTH, 0x02),
    (YEAR, 0x28),
    (CENTURY, 0x20),
];

#[test]
fn a_new_clock_shows_the_hosts_time_in_bcd() {
    let rtc = clock(0, ClockPolicy::Continue);
    let before = civil(host_ns());
    let (year, day) = (get(&rtc, YEAR), get(&rtc, DAY));
    let after = civil(host_ns());
    let shows = |now: DateTime| {
        i16::from(year >> 4) * 10 + i16::from(year & 15) == now.year() % 100
            && (day >> 4) * 10 + (day & 15) == u8::try_from(now.day()).unwrap()
    };
    assert!(shows(before) || shows(after));
    assert_eq!(get(&rtc, CENTURY), 0x20);
    assert_eq!(get(&rtc, STATUS_D), D_VALID);
    let mut index = [0];
    rtc.read(0, &mut index);
    assert_eq!(index, [0xff]);
}

#[test]
fn an_offset_is_added() {
    let year = 366 * 86_400;
    let (now, later) = (
        clock(0, ClockPolicy::Continue),
        clock(year, ClockPolicy::Continue),
    );
    assert_ne!(get(&now, YEAR), get(&later, YEAR));
}

#[test]
fn the_time_that_a_guest_sets_runs_on_and_is_saved() {
    let rtc = clock(0, ClockPolicy::Continue);
    set_time(&rtc, &LEAP_DAY);
    assert_eq!((get(&rtc, HOURS), get(&rtc, MINUTES)), (0x23, 0x59));
    // 29 February 2028 is a Tuesday.
    assert_eq!((get(&rtc, DAY), get(&rtc, WEEKDAY)), (0x29, 3));
    let other = clock(12_345, ClockPolicy::Continue);
    let mut state = StateSet::new(rtc.save()).unwrap();
    other.restore(&mut state).unwrap();
    state.finish().unwrap();
    assert_eq!((get(&other, MONTH), get(&other, YEAR)), (0x02, 0x28));
}

#[test]
fn both_forms_of_hours_and_numbers_are_there() {
    let rtc = clock(0, ClockPolicy::Continue);
    set_time(&rtc, &LEAP_DAY);
    set(&rtc, STATUS_B, 0);
    assert_eq!(get(&rtc, HOURS), 0x11 | AFTERNOON);
    set(&rtc, STATUS_B, B_BINARY);
    assert_eq!(get(&rtc, HOURS), 11 | AFTERNOON);
    assert_eq!(get(&rtc, MINUTES), 59);
    set_time(&rtc, &[(HOURS, 12), (MINUTES, 5)]);
    set(&rtc, STATUS_B, B_BINARY | B_HOURS_24);
    assert_eq!((get(&rtc, HOURS), get(&rtc, MINUTES)), (0, 5));
}

#[test]
fn no_date_leaves_the_clock_as_it_is() {
    let rtc = clock(0, ClockPolicy::Continue);
    set_time(&rtc, &LEAP_DAY);
    set_time(&rtc, &[(MONTH, 0x13), (DAY, 0xff)]);
    assert_eq!((get(&rtc, MONTH), get(&rtc, DAY)), (0x02, 0x29));
}

#[test]
fn a_restored_clock_goes_on_or_catches_up_as_asked() {
    let saved = RtcV1 {
        index: 0,
        cmos: vec![0; CMOS_BYTES],
        clock_ns: 1_000 * NS_PER_SECOND,
        realtime_ns: host_ns() - 500 * NS_PER_SECOND,
    };
    let restored = |policy| {
        let rtc = clock(0, policy);
        let section = StateSection::encode(0, &saved);
        let mut state = StateSet::new(vec![section]).unwrap();
        rtc.restore(&mut state).unwrap();
        rtc.shared.lock().clock_ns() / NS_PER_SECOND
    };
    assert!((1_000..1_010).contains(&restored(ClockPolicy::Continue)));
    assert!((1_500..1_510).contains(&restored(ClockPolicy::Realtime)));
}

#[test]
fn memory_of_another_size_is_refused() {
    let rtc = clock(0, ClockPolicy::Continue);
    let section = StateSection::encode(
        0,
        &RtcV1 {
            index: 0,
            cmos: vec![0; 5],
            clock_ns: 0,
            realtime_ns: 0,
        },
    );
    let mut state = StateSet::new(vec![section]).unwrap();
    assert!(rtc.restore(&mut state).is_err());
}

/// A clock whose interrupts are counted, and the count.
fn counted() -> (Rtc, Arc<Mutex<(bool, u32)>>) {
    let raised = Arc::new(Mutex::new((false, 0)));
    let by_line = raised.clone();
    let line = move |active| {
        let mut raised = by_line.lock().unwrap();
        if active && !raised.0 {
            raised.1 += 1;
        }
        raised.0 = active;
    };
    let rtc = clock_with(0, ClockPolicy::Continue, Box::new(line));
    (rtc, raised)
}

fn wait_for(raised: &Mutex<(bool, u32)>, count: u32) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while raised.lock().unwrap().1 < count {
        assert!(Instant::now() < deadline, "no interrupt");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_line_is_raised_once_a_second_until_it_is_acknowledged() {
    let (rtc, raised) = counted();
    rtc.resume();
    set(&rtc, STATUS_B, B_HOURS_24 | UPDATE);
    wait_for(&raised, 1);
    assert_eq!(
        get(&rtc, STATUS_C) & (C_INTERRUPT | UPDATE),
        C_INTERRUPT | UPDATE
    );
    assert!(!raised.lock().unwrap().0);
    wait_for(&raised, 2);
    rtc.reset();
    assert_eq!(get(&rtc, STATUS_C), 0);
}

#[test]
fn an_alarm_goes_off_at_its_time_and_not_in_a_pause() {
    let (rtc, raised) = counted();
    set_time(&rtc, &LEAP_DAY);
    // 23:59:30 is now; any hour and minute, at second 31.
    for (register, value) in [(1, 0x31), (3, 0xc0), (5, 0xff)] {
        set(&rtc, register, value);
    }
    set(&rtc, STATUS_B, B_HOURS_24 | ALARM);
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(raised.lock().unwrap().1, 0, "it is paused");
    rtc.resume();
    wait_for(&raised, 1);
    let state = StateSet::new(rtc.save());
    let (other, raised) = counted();
    other.restore(&mut state.unwrap()).unwrap();
    assert_eq!(
        *raised.lock().unwrap(),
        (true, 1),
        "the line's level came back"
    );
    assert_eq!(get(&other, STATUS_C) & ALARM, ALARM);
}
