package images

import (
	"context"
	"sync"
	"time"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// openKey tells openings apart: by repository and manifest, or by the reference
// where the manifest is not known.
type openKey struct {
	name     string // host/repository
	manifest blockdev.Digest
	ref      string // only if manifest is zero
}

// opening is one attempt to get the indexes of an image and to mount its diffs.
// It ends with its result, with the snapshotter or after the time-out, and never
// because the callers that wait for it have left.
type opening struct {
	key    openKey
	ref    string        // what the image was called when it was begun
	done   chan struct{} // closed when image and err are set
	cancel context.CancelFunc
	image  *Opened
	err    error
	cred   image.Credential // with which it is opened
	// ahead: it was begun before the first Prepare, so that its failure counts for
	// failureTTL.
	ahead   bool
	explain sync.Once // the one line that says why it failed

	// Below here under openings.mu.
	users   int
	claimed bool        // a Prepare has asked for it
	timer   *time.Timer // ends a result that nobody uses
}

// attempt is what opens an image.
type attempt struct {
	ref  string           // what the image is called
	cred image.Credential // what it does so with
	open func(context.Context) (*Opened, error)
}

// failureTTL is for how long a Prepare takes the failure of an opening that was
// begun before it for an answer, and does not try again itself.
const failureTTL = 30 * time.Second

// openings are the images being opened, and those that are open and have not been
// made snapshots of yet.
type openings struct {
	mu     sync.Mutex
	m      map[openKey]*opening
	closed bool
	// flights counts goroutines: openings, and results being given up.
	flights sync.WaitGroup

	base    context.Context // ends with the snapshotter
	timeout time.Duration   // of an opening
	idle    time.Duration   // how long a result is kept that nobody uses
	// ended is called, in a goroutine, when a result has been given up unused.
	ended func(ctx context.Context, o *opening)
	// failed is called, without a lock, when an opening has failed that was begun ahead.
	failed func(o *opening, err error)
}

// join returns the opening for key, begun by try if there is none. ahead: for a
// Prepare that is still to come, so one that has failed is begun again. Every join
// needs a leave.
func (os *openings) join(key openKey, ahead bool, try attempt) *opening {
	os.mu.Lock()
	defer os.mu.Unlock()
	if os.closed {
		o := &opening{done: make(chan struct{}), err: ErrClosed, users: 1}
		close(o.done)
		return o
	}
	o := os.m[key]
	if o != nil && ahead && o.failed() {
		os.dropLocked(o)
		o = nil
	}
	if o == nil {
		o = os.startLocked(key, ahead, try)
	}
	o.claimed = o.claimed || !ahead
	os.useLocked(o)
	return o
}

// find returns the opening for key; nil: there is none. It needs a leave, too.
func (os *openings) find(key openKey) *opening {
	os.mu.Lock()
	defer os.mu.Unlock()
	o := os.m[key]
	if o != nil {
		os.useLocked(o)
	}
	return o
}

func (os *openings) useLocked(o *opening) {
	o.users++
	if o.image != nil && o.timer != nil {
		o.timer.Stop()
		o.timer = nil
	}
}

// failed reports whether an opening has ended without an image.
func (o *opening) failed() bool {
	select {
	case <-o.done:
		return o.err != nil
	default:
		return false
	}
}

func (os *openings) startLocked(key openKey, ahead bool, try attempt) *opening {
	ctx, cancel := context.WithTimeout(os.base, os.timeout)
	o := &opening{key: key, ref: try.ref, ahead: ahead, cred: try.cred, done: make(chan struct{}), cancel: cancel}
	if os.m == nil {
		os.m = make(map[openKey]*opening)
	}
	os.m[key] = o
	os.flights.Go(func() {
		defer cancel()
		image, err := try.open(ctx)
		if err != nil && ahead {
			os.failed(o, err)
		}
		os.mu.Lock()
		defer os.mu.Unlock()
		o.image, o.err = image, err
		close(o.done)
		switch {
		case err != nil && !ahead:
			os.dropLocked(o)
		case err != nil:
			os.expireLocked(o, failureTTL)
		case o.users == 0:
			os.expireLocked(o, os.idleOf(o))
		}
	})
	return o
}

// leave ends one use of an opening. finished: all layers of the image have been
// made snapshots, so that its result is of no more use.
func (os *openings) leave(o *opening, finished bool) {
	os.mu.Lock()
	defer os.mu.Unlock()
	o.users--
	if o.users > 0 || o.image == nil {
		return
	}
	if finished || os.closed || os.m[o.key] != o {
		os.dropLocked(o)
		return
	}
	os.expireLocked(o, os.idleOf(o))
}

func (os *openings) idleOf(o *opening) time.Duration {
	if o.claimed {
		return os.idle
	}
	return min(os.idle, claimTime)
}

// dropLocked makes the next join a new opening, and lets the diffs go if nobody
// uses the result.
func (os *openings) dropLocked(o *opening) {
	if os.m[o.key] == o {
		delete(os.m, o.key)
	}
	if o.timer != nil {
		o.timer.Stop()
		o.timer = nil
	}
	if o.users == 0 && o.image != nil {
		o.image.release()
	}
}

func (os *openings) expireLocked(o *opening, after time.Duration) {
	if o.timer != nil {
		o.timer.Stop()
	}
	o.timer = time.AfterFunc(after, func() {
		os.mu.Lock()
		if os.closed || os.m[o.key] != o || o.image != nil && o.users > 0 {
			os.mu.Unlock()
			return
		}
		os.dropLocked(o)
		os.flights.Add(1)
		os.mu.Unlock()
		defer os.flights.Done()
		os.ended(os.base, o)
	})
}

// close waits for openings under way, whose context has been cancelled by then.
func (os *openings) close() {
	os.mu.Lock()
	os.closed = true
	for _, o := range os.m {
		os.dropLocked(o)
	}
	os.mu.Unlock()
	os.flights.Wait()
}
