package wire

import (
	"context"
	"errors"
	"strings"
	"unicode"

	"github.com/shoalfs/shoal/blockdev"
)

// codes pairs codes with the errors they carry. The order is that of
// FromError's search: what tells the caller most comes first.
var codes = []struct {
	code Code
	err  error
}{
	{Code_CODE_UNAUTHORIZED, blockdev.ErrUnauthorized},
	{Code_CODE_NOT_FOUND, blockdev.ErrNotFound},
	{Code_CODE_UNSUPPORTED, blockdev.ErrUnsupported},
	{Code_CODE_CORRUPT, blockdev.ErrCorrupt},
	{Code_CODE_NO_SPACE, blockdev.ErrNoSpace},
	{Code_CODE_BUSY, ErrBusy},
	{Code_CODE_UNAVAILABLE, blockdev.ErrUnavailable},
}

// ErrBusy says that a limit of the sender is reached. It wraps
// blockdev.ErrUnavailable.
var ErrBusy error = busyError{}

type busyError struct{}

func (busyError) Error() string { return "busy" }
func (busyError) Unwrap() error { return blockdev.ErrUnavailable }

// RemoteError is a failure that the other end has reported. It wraps the
// blockdev error that its code stands for; ErrUnavailable where there is none.
type RemoteError struct {
	Code Code
	Text string // cleaned, may be empty
}

// Error returns the text, or the meaning of the code where there is none.
func (e *RemoteError) Error() string {
	if e.Text != "" {
		return e.Text
	}
	return e.Unwrap().Error()
}

// Answered says that the other end was there; package snapshotter looks for the
// method, to tell users so.
func (e *RemoteError) Answered() bool { return true }

// Unwrap returns the blockdev error, or ErrBusy.
func (e *RemoteError) Unwrap() error {
	for _, c := range codes {
		if c.code == e.Code {
			return c.err
		}
	}
	return blockdev.ErrUnavailable
}

// FromError returns the message for err, which must not be nil. Errors that wrap
// none of blockdev's get CODE_INTERNAL, a context's CODE_UNAVAILABLE.
func FromError(err error) *Error {
	m := &Error{Code: Code_CODE_INTERNAL, Text: CleanText(err.Error(), MaxErrorText)}
	if remote := (*RemoteError)(nil); errors.As(err, &remote) {
		m.Code = remote.Code
		return m
	}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			m.Code = c.code
			return m
		}
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		m.Code = Code_CODE_UNAVAILABLE
	}
	return m
}

// Err returns what x says as an error, a *RemoteError with a cleaned text.
func (x *Error) Err() error {
	return &RemoteError{Code: x.GetCode(), Text: CleanText(x.GetText(), MaxErrorText)}
}

// CleanText makes text of unknown origin fit for logs and terminals: what is not
// printable becomes a space, and it is cut to limit bytes.
func CleanText(s string, limit int) string {
	// Cut first, so that a huge text costs nothing.
	if len(s) > limit {
		s = s[:limit]
	}
	s = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	return strings.TrimSpace(s)
}
