package snapshotter

import (
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// unknownInterval is how often it is said at most that snapshots are missing:
// containerd asks for the same ones again and again.
const unknownInterval = time.Minute

// unknown explains that containerd asks for snapshots that are not here.
type unknown struct {
	log  *slog.Logger
	said atomic.Int64 // Unix nanoseconds
}

// explain returns err, and says what to do if it means that containerd has asked for a
// snapshot that is not here. containerd asks only for those that its own metadata has,
// and as long as that has them, it refuses to make them again: no pull gets as far as
// this snapshotter.
func (u *unknown) explain(key string, err error) error {
	if !errdefs.IsNotFound(err) {
		return err
	}
	now := time.Now().UnixNano()
	last := u.said.Load()
	if last != 0 && now-last < int64(unknownInterval) || !u.said.CompareAndSwap(last, now) {
		return err
	}
	u.log.Error("containerd asks for a snapshot that is not here: the directory of the node and that of containerd do not match, because one of them was emptied or restored. "+
		"Remove the containers of this snapshotter; then run crictl rmi IMAGE and crictl pull IMAGE for each of its images, the pause image too", "snapshot", key)
	return err
}
