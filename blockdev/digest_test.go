package blockdev

import (
	"strings"
	"testing"
)

// TestParse: a digest has one spelling in each of its two forms.
func TestParse(t *testing.T) {
	d := Sum([]byte("x"))
	if got, ok := ParseHex(d.Hex()); !ok || got != d {
		t.Errorf("%v, %v", got, ok)
	}
	if got, err := ParseDigest(d.String()); err != nil || got != d {
		t.Errorf("%v, %v", got, err)
	}
	hex := d.Hex()
	for _, s := range []string{"", hex[:63], hex + "0", hex + "/", strings.ToUpper(hex), "0x" + hex[2:], hex[:63] + "g", " " + hex[1:], d.String()} {
		if got, ok := ParseHex(s); ok {
			t.Errorf("%q was taken for %v", s, got)
		}
		if s != d.String() {
			if got, err := ParseDigest(digestPrefix + s); err == nil {
				t.Errorf("%q was taken for %v", digestPrefix+s, got)
			}
		}
		if got, err := ParseDigest("sha512:" + hex); err == nil {
			t.Errorf("sha512 was taken for %v", got)
		}
	}
}
