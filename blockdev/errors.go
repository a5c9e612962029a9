package blockdev

import "errors"

// Causes that callers act upon. Test for them with errors.Is; the errors that
// carry them name the image, layer or chunk and the reason.
var (
	// ErrNotFound: the image, index or chunk is not there. Asking another
	// source may help; asking the same one again will not.
	ErrNotFound = errors.New("not found")
	// ErrUnauthorized: the registry refuses this credential (or wants one).
	ErrUnauthorized = errors.New("access denied by the registry")
	// ErrUnsupported: a media type, compression, encryption or tar feature that
	// cannot be served lazily. containerd is to unpack the image.
	ErrUnsupported = errors.New("cannot be served lazily")
	// ErrUnavailable: the source cannot answer now (down, slow, overloaded).
	// Trying again later, or elsewhere, may help.
	ErrUnavailable = errors.New("source unavailable")
	// ErrCorrupt: bytes do not match their digest, or a structure does not parse.
	ErrCorrupt = errors.New("corrupt data")
	// ErrNoSpace: the disk, or the byte quota, is full.
	ErrNoSpace = errors.New("no space left")
	// ErrQuarantined: the index of a diff was found not to be that of its DiffID
	// once all bytes were there. Nothing new is to read through it.
	ErrQuarantined = errors.New("quarantined")
)

// kinds are these errors in a word. Of several that an error wraps, the first one counts.
var kinds = []struct {
	err  error
	kind string
}{
	{ErrUnauthorized, "unauthorized"},
	{ErrNotFound, "not_found"},
	{ErrUnsupported, "unsupported"},
	{ErrNoSpace, "no_space"},
	{ErrQuarantined, "corrupt"},
	{ErrCorrupt, "corrupt"},
	{ErrUnavailable, "unavailable"},
}

// Kind returns which of these errors an error wraps, in a word for metrics and records, or
// "" if it wraps none.
func Kind(err error) string {
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return k.kind
		}
	}
	return ""
}
