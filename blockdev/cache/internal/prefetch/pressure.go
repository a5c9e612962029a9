package prefetch

import (
	"fmt"
	"os"
)

// pressure is for how many of the last 10 seconds, in percent, some task of this machine
// must have waited for a processor, so that background work makes containers slower.
const pressure = 50

// pressed says whether the processors have more to do than they can; false where the
// kernel does not say it (it has no PSI).
func pressed() bool {
	b, err := os.ReadFile("/proc/pressure/cpu")
	return err == nil && waiting(b) >= pressure
}

// waiting reads a pressure file: the share of the last 10 seconds, in percent, in which
// some task waited; 0 if it is no such file.
func waiting(file []byte) (percent float64) {
	_, _ = fmt.Sscanf(string(file), "some avg10=%f", &percent)
	return percent
}
