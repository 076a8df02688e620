//! Operations that begin on the thread that read their request.
//!
//! Most of them make one call and answer when its reply comes. The call goes out from this thread;
//! only the rest of the operation is a task of the runtime, and only once there is something for
//! it to do. So a request costs one switch between threads, not two.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};

use tokio::runtime::Handle;
use tokio::sync::Notify;

use nfs::rpc::Nfs3;

type Operation = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Where an operation is that has begun.
enum Place {
    /// Being polled for the first time.
    Here,
    /// The same, and there is something for it to do already.
    Woken,
    /// Waiting.
    Kept(Operation),
    /// A task, or over.
    Gone,
}

struct Begun {
    runtime: Handle,
    place: Mutex<Place>,
}

impl Begun {
    fn replace(&self, by: impl FnOnce(Place) -> (Place, Option<Operation>)) {
        let mut place = self.place.lock().unwrap_or_else(|e| e.into_inner());
        let (next, task) = by(std::mem::replace(&mut *place, Place::Gone));
        *place = next;
        drop(place);
        if let Some(task) = task {
            self.runtime.spawn(task);
        }
    }
}

impl Wake for Begun {
    fn wake(self: Arc<Self>) {
        self.replace(|place| match place {
            Place::Here | Place::Woken => (Place::Woken, None),
            Place::Kept(operation) => (Place::Gone, Some(operation)),
            Place::Gone => (Place::Gone, None),
        });
    }
}

/// Waits until `ready` says so; it is asked now, and each time that `notify` wakes whoever waits.
pub(super) async fn until(notify: &Notify, ready: impl Fn() -> bool) {
    loop {
        let told = notify.notified();
        tokio::pin!(told);
        // Before the question, so that nothing is missed between the two.
        told.as_mut().enable();
        if ready() {
            return;
        }
        told.await;
    }
}

/// Runs an operation, on this thread as long as it does not have to wait.
pub(super) fn begin(
    runtime: &Handle,
    nfs: &Nfs3,
    operation: impl Future<Output = ()> + Send + 'static,
) {
    let begun = Arc::new(Begun {
        runtime: runtime.clone(),
        place: Mutex::new(Place::Here),
    });
    let waker = Waker::from(Arc::clone(&begun));
    let mut operation: Operation = Box::pin(operation);
    let context = runtime.enter();
    let polled = nfs.gather(|| {
        let mut context = Context::from_waker(&waker);
        // As in a task of the runtime, a panic ends the operation only.
        catch_unwind(AssertUnwindSafe(|| operation.as_mut().poll(&mut context)))
    });
    drop(context);
    if let Ok(Poll::Pending) = polled {
        begun.replace(|place| match place {
            Place::Woken => (Place::Gone, Some(operation)),
            _ => (Place::Kept(operation), None),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::thread::{self, ThreadId};

    use tokio::runtime::Builder;
    use tokio::sync::{mpsc, oneshot};

    use super::*;
    use nfs::rpc::Settings;

    /// Begins an operation on a thread of its own and then runs the runtime until `check` is done.
    fn on_a_thread<T>(
        operation: impl Future<Output = ()> + Send + 'static,
        check: impl Future<Output = T>,
    ) -> (ThreadId, T) {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let settings = Settings::new(([192, 0, 2, 1], 2049).into());
        let nfs = runtime.block_on(Nfs3::connect(settings)).unwrap();
        let handle = runtime.handle().clone();
        let thread = thread::spawn(move || {
            begin(&handle, &nfs, operation);
            thread::current().id()
        });
        let id = thread.join().expect("a panic of the operation stays in it");
        (id, runtime.block_on(check))
    }

    #[test]
    fn an_operation_begins_on_its_thread_and_goes_on_in_the_runtime() {
        let (go, gone) = oneshot::channel();
        let (seen, mut places) = mpsc::unbounded_channel();
        let operation = async move {
            seen.send(thread::current().id()).unwrap();
            gone.await.unwrap();
            seen.send(thread::current().id()).unwrap();
        };
        let (began, places) = on_a_thread(operation, async {
            let first = places.recv().await.unwrap();
            tokio::task::yield_now().await;
            assert!(places.try_recv().is_err(), "it waits");
            go.send(()).unwrap();
            [first, places.recv().await.unwrap()]
        });
        assert_eq!(places, [began, thread::current().id()]);
    }

    #[test]
    fn an_operation_that_is_woken_at_once_goes_on() {
        let (done, is_done) = oneshot::channel();
        let operation = async move {
            // Wakes itself before it has been put away.
            let mut again = true;
            std::future::poll_fn(|context| {
                context.waker().wake_by_ref();
                match std::mem::take(&mut again) {
                    true => Poll::Pending,
                    false => Poll::Ready(()),
                }
            })
            .await;
            done.send(()).unwrap();
        };
        assert_eq!(on_a_thread(operation, is_done).1, Ok(()));
    }

    #[test]
    fn a_panic_ends_the_operation_only() {
        let (answer, answered) = oneshot::channel::<()>();
        let operation = async move {
            let _answer = answer;
            panic!("this one is on purpose");
        };
        assert!(on_a_thread(operation, answered).1.is_err(), "it is dropped");
    }
}
