//! Programs as people run them.

use lab::process::Task;
use lab::{Lab, Result};
use libtest_mimic::Trial;

use crate::{Host, fuse_trial, nas};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        fuse_trial("sqlite", sqlite),
        fuse_trial("git_clone_and_fsck", git),
        fuse_trial("tar_keeps_every_byte_and_mode", tar),
        fuse_trial("a_compile", compile),
        fuse_trial("locks_between_processes_of_a_host", locks),
    ]
}

/// tests/judges.rs runs it on the machine's kernel.
pub(crate) fn judged() -> Trial {
    fuse_trial("fsx", |lab| {
        let host = Host::mount(nas(lab)?, "fsx", "")?;
        script(&host, &lab::fsx::script(".")).map(drop)
    })
}

/// Runs a shell script in a mounted directory.
fn script(host: &Host, text: &str) -> Result<String> {
    let text = format!("set -eu; cd {}; {text}", host.display());
    Task::new(&["bash", "-c", &text]).run()?.ok()
}

fn sqlite(lab: &'static Lab) -> Result {
    let host = Host::mount(nas(lab)?, "sqlite", "")?;
    script(
        &host,
        "sqlite3 t.db 'pragma journal_mode=delete; create table t (id integer primary key, v text)'
         for w in 1 2 3; do
           (for i in $(seq 40); do
              sqlite3 -cmd '.timeout 60000' t.db \"insert into t (v) values ('$w-$i')\"
            done) &
         done; wait
         sqlite3 t.db 'begin; with recursive n(i) as (select 1 union all select i+1 from n where
           i < 20000) insert into t (v) select hex(randomblob(40)) from n; commit; vacuum'
         [ \"$(sqlite3 t.db 'pragma integrity_check')\" = ok ]
         [ \"$(sqlite3 t.db 'select count(*) from t')\" = 20120 ]
         [ ! -e t.db-journal ]",
    )?;
    let other = Host::mount(nas(lab)?, "sqlite", "")?;
    script(
        &other,
        "[ \"$(sqlite3 t.db 'pragma integrity_check; select count(*) from t')\" = $'ok\\n20120' ]",
    )?;
    Ok(())
}

/// Without a commit-graph: that of a checkout may name commits that nothing reaches any more, and then git
/// fails on any file system once they are packed away.
fn git(lab: &'static Lab) -> Result {
    let host = Host::mount(nas(lab)?, "git", "")?;
    let source = env!("CARGO_MANIFEST_DIR");
    script(
        &host,
        &format!(
            "export HOME=$PWD GIT_CONFIG_NOSYSTEM=1
             git config --global --add safe.directory '*'
             git config --global user.name t; git config --global user.email t@t
             git config --global core.commitGraph false
             git clone -q --no-hardlinks {source} clone; cd clone
             git fsck --full
             git checkout -qb work; for i in $(seq 30); do echo $i >f$i; git add f$i
               git commit -qm $i; done
             git repack -adq; git gc -q; git fsck --full
             [ -z \"$(git status --porcelain)\" ]; git log --oneline | wc -l"
        ),
    )?;
    Ok(())
}

/// But for the times of symlinks, which nfs-ganesha says it sets and does not.
fn tar(lab: &'static Lab) -> Result {
    let host = Host::mount(nas(lab)?, "tar", "")?;
    let source = env!("CARGO_MANIFEST_DIR");
    script(
        &host,
        &format!(
            "work=$(mktemp -d); trap 'rm -rf $work' EXIT
             mkdir $work/tree; cp -a {source}/src {source}/tests {source}/Cargo.lock $work/tree
             cd $work/tree; ln -s nowhere link; ln Cargo.lock hard; mkfifo pipe; mkdir -p d/e/f
             chmod 0700 d; chmod 01777 d/e; touch -d '1999-12-31 23:59:59.123456789' d/e/f
             printf x >$'name \\377\\n'; truncate -s 3M holes
             cd $work; tar --format=posix -cf tree.tar tree; mkdir local {dir}/out
             tar -C local -xpf tree.tar; tar -C {dir}/out -xpf tree.tar
             diff -r --no-dereference -x pipe tree {dir}/out/tree
             list() {{ (cd $1 && find . -printf '%p %y %m %s %l %n %T@ %U:%G\\n' |
               sed -E 's/^(.* d [0-7]+) [0-9]+/\\1/; s/^(.* l .*) [0-9.]+ /\\1 /' | sort); }}
             diff <(list local/tree) <(list {dir}/out/tree)
             tar -C {dir}/out --format=posix -cf back.tar tree; tar -df back.tar -C local",
            dir = host.display()
        ),
    )?;
    Ok(())
}

fn compile(lab: &'static Lab) -> Result {
    let host = Host::mount(nas(lab)?, "compile", "")?;
    script(
        &host,
        "for i in $(seq 12); do echo \"int f$i(int x) { return x + $i; }\" >f$i.c; done
         { for i in $(seq 12); do echo \"int f$i(int);\"; done
           echo 'int main(void) { int s = 0;'
           for i in $(seq 12); do echo \"s += f$i(1);\"; done; echo 'return s != 90; }'; } >main.c
         { printf 'all: prog\\nOBJ = main.o'; for i in $(seq 12); do printf \" f$i.o\"; done
           printf '\\nprog: $(OBJ)\\n\\t$(CC) -o $@ $(OBJ)\\n'; } >Makefile
         make -j4 -s; ./prog; touch f3.c; make -s | cat; make -q; ./prog",
    )?;
    Ok(())
}

fn locks(lab: &'static Lab) -> Result {
    let host = Host::mount(nas(lab)?, "locks", "")?;
    script(
        &host,
        "echo 0 >count
         bump() { for i in $(seq 100); do
             flock lock sh -c 'echo $(($(cat count) + 1)) >count'; done; }
         bump & bump & bump & wait; [ $(cat count) = 300 ]",
    )?;
    Ok(())
}
