package defaults

import (
	"log/slog"
	"testing"
	"time"
)

func TestSet(t *testing.T) {
	n, s, d := -1, "", time.Duration(0)
	Set(&n, 3)
	Set(&s, "three")
	Set(&d, time.Second)
	if n != -1 || s != "three" || d != time.Second {
		t.Errorf("%d, %q, %v", n, s, d)
	}
	Positive(&n, 3)
	Positive(&d, time.Minute)
	if n != 3 || d != time.Second {
		t.Errorf("%d, %v", n, d)
	}
}

func TestLog(t *testing.T) {
	var none *slog.Logger
	Log(&none)
	none.Error("nobody reads this")
	own := slog.Default()
	if Log(&own); own != slog.Default() {
		t.Error("a logger was replaced")
	}
}
