package blockdev

// Finding is one thing that a check of a data directory has found wrong.
type Finding struct {
	// Where names the thing: a layer, a file, a mount.
	Where string `json:"where"`
	// Problem says what is wrong with it.
	Problem string `json:"problem"`
	// Repaired says what was done about it; empty: nothing.
	Repaired string `json:"repaired,omitempty"`
}
