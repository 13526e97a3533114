//! The oracle: memory of the `pagewriter` guest is of one moment, or it is not.
//!
//! guests/README.md describes the pages; this reads them as it says.

const HEADER_GPA: u64 = 0x10_0000;
const PAGE: usize = 4096;
const HEAD_MAGIC: u64 = u64::from_le_bytes(*b"LVPHEAD1");
const LIVE_MAGIC: u64 = u64::from_le_bytes(*b"LVPLIVE1");
const PAGE_MAGIC: u64 = u64::from_le_bytes(*b"LVPPAGE1");

/// One page, as its 512 words.
type Words = [u64; 512];

struct Segment {
    gpa: u64,
    pages: u64,
}

/// How much the check has seen, so that a test can tell that it saw anything.
#[derive(Debug, Default)]
pub struct Seen {
    pub working_set_pages: u64,
    pub torn_allowed: u64,
    pub fill_pages: u64,
}

/// Fails unless the memory that `read` returns, page by page, is of a single moment.
///
/// `fill_stride` checks every so-many-th page of the fill.
pub fn assert_single_moment(mut read: impl FnMut(u64, &mut [u8]), fill_stride: u64) -> Seen {
    let mut bytes = vec![0_u8; PAGE];
    let mut page = |gpa: u64| -> Words {
        read(gpa, &mut bytes);
        std::array::from_fn(|i| u64::from_le_bytes(bytes[i * 8..i * 8 + 8].try_into().unwrap()))
    };
    let head = page(HEADER_GPA);
    assert_eq!(
        head[0], HEAD_MAGIC,
        "the header page is not the page writer's"
    );
    assert_eq!((head[1], head[2]), (1, 1), "version and state (running)");
    let whole_pages = head[6] == 1;
    let working_set = segments(&head, 12, 13);
    let mut seen = Seen::default();
    for vcpu in 0..head[3] {
        let at = 64 + 4 * usize::try_from(vcpu).unwrap();
        let (first, pages, live) = (head[at], head[at + 1], page(head[at + 3]));
        assert_eq!(
            (live[0], live[1]),
            (LIVE_MAGIC, vcpu),
            "live page of vCPU {vcpu}"
        );
        let (pass, position) = (live[2] / pages + 1, live[2] % pages);
        for number in first..first + pages {
            let gpa = gpa_of(&working_set, number);
            let words = page(gpa);
            seen.working_set_pages += 1;
            let place = format!("page {gpa:#x} of vCPU {vcpu} (pass {pass} at {position})");
            assert_eq!(
                (words[0], words[1], words[2]),
                (PAGE_MAGIC, gpa, vcpu),
                "{place}"
            );
            if words[4] == position && whole_pages {
                // It is being written: any mixture of the two passes.
                seen.torn_allowed += 1;
                continue;
            }
            let wanted = if words[4] < position { pass } else { pass - 1 };
            let current = words[4] == position && words[3] == pass;
            assert!(
                words[3] == wanted || current,
                "{place}: has pass {}, not {wanted}",
                words[3]
            );
            let filled_by = if whole_pages { wanted } else { 0 };
            assert_eq!(words[511], filled_by, "{place}: last word");
            for (i, word) in stream(gpa, filled_by).enumerate().take(511).skip(8) {
                assert_eq!(words[i], word, "{place}: word {i}");
            }
        }
    }
    if head[11] == 2 {
        for segment in segments(&head, 29, 30) {
            for at in (0..segment.pages).step_by(usize::try_from(fill_stride).unwrap()) {
                let gpa = segment.gpa + at * PAGE as u64;
                let words = page(gpa);
                seen.fill_pages += 1;
                for (i, word) in stream(gpa, u64::MAX).enumerate() {
                    assert_eq!(words[i], word, "page {gpa:#x} of the fill: word {i}");
                }
            }
        }
    }
    seen
}

fn segments(head: &Words, count_at: usize, first_at: usize) -> Vec<Segment> {
    let count = usize::try_from(head[count_at]).unwrap();
    assert!(count <= 8, "{count} segments");
    (0..count)
        .map(|i| Segment {
            gpa: head[first_at + 2 * i],
            pages: head[first_at + 1 + 2 * i],
        })
        .collect()
}

fn gpa_of(segments: &[Segment], number: u64) -> u64 {
    let mut left = number;
    for segment in segments {
        if left < segment.pages {
            return segment.gpa + left * PAGE as u64;
        }
        left -= segment.pages;
    }
    panic!("page {number} is in no segment");
}

/// The words that fill a page.
fn stream(gpa: u64, pass: u64) -> impl Iterator<Item = u64> {
    let scatter = |v: u64| {
        let v = (v ^ (v >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let v = (v ^ (v >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        v ^ (v >> 31)
    };
    let mut last: [u64; 8] = std::array::from_fn(|i| {
        scatter(gpa.wrapping_add(i as u64) ^ pass.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1
    });
    (0..512_usize).map(move |i| {
        if i >= 8 {
            let x = &mut last[i % 8];
            *x ^= *x << 13;
            *x ^= *x >> 7;
            *x ^= *x << 17;
        }
        last[i % 8]
    })
}
