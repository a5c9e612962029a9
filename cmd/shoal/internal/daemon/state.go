package daemon

import (
	"errors"
	"sync/atomic"
)

// State says whether a daemon lives, and whether it serves what it is there for.
type State struct{ healthy, ready atomic.Pointer[func() error] }

// Starting returns the state of a daemon that lives and does not serve yet; why is a
// sentence about what it still has to do.
func Starting(why string) *State {
	s, err := &State{}, errors.New(why)
	not := func() error { return err }
	s.ready.Store(&not)
	return s
}

// Set says how both are found out from now on. healthy may be nil: that the process
// answers is all there is to know. What is not healthy is not ready.
func (s *State) Set(healthy, ready func() error) {
	if healthy != nil {
		s.healthy.Store(&healthy)
	}
	s.ready.Store(&ready)
}

// Healthy says why the daemon cannot work; nil: it can, or it has just begun.
func (s *State) Healthy() error {
	if f := s.healthy.Load(); f != nil {
		return (*f)()
	}
	return nil
}

// Ready says why the daemon does not serve; nil: it does.
func (s *State) Ready() error {
	if err := s.Healthy(); err != nil {
		return err
	}
	return (*s.ready.Load())()
}
