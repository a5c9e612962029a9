package volume

import (
	"context"
	"errors"
)

// Close ends prefetch and service, and leaves all mounts as they are (see the
// package comment). It is to be called after the last use of the Manager.
func (m *Manager) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	vols := make([]*volume, 0, len(m.vols))
	for _, v := range m.vols {
		vols = append(vols, v)
	}
	m.mu.Unlock()
	m.startups.tasks.Close()
	m.queues.close(vols)
	m.chores.Close()
	// While reads are still answered: it can take a while.
	m.cache.Sync(context.Background())
	return errors.Join(m.conn.close(), m.cache.Close())
}
