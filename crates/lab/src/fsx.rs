//! [fsx](https://crates.io/crates/fsx): random reads, writes, maps, cuts and syncs of one file, whose
//! bytes it knows. A program that the Makefile installs.

use super::tool;

/// Seeds of fsx, and how many steps it does with each on a small file and on a large one.
const SEEDS: &str = "1 2";
const STEPS_EACH: usize = 1000;
/// What all of that is.
pub const STEPS: usize = STEPS_EACH * 2 * 2;
/// The longest of its calls on a large file, in bytes; the file is four times as long.
const LARGE: usize = 200_000;

/// Runs it with these seeds on files in `dir`: small calls on small files, then large ones.
pub fn script(dir: &str) -> String {
    let fsx = tool("fsx");
    format!(
        "for seed in {SEEDS}; do
           for size in 1000 {LARGE}; do
             cat >/tmp/fsx.$$ <<END
flen = $((size * 4))
[opsize]
max = $size
[weights]
close_open = 3
invalidate = 1
truncate = 5
fsync = 1
fdatasync = 1
sendfile = 5
posix_fadvise = 2
copy_file_range = 2
END
             {fsx} -q -N {STEPS_EACH} -S $seed -f /tmp/fsx.$$ -P /tmp {dir}/file-$seed-$size
           done
         done; rm /tmp/fsx.$$"
    )
}
