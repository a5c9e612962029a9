package wire

import (
	"fmt"

	"github.com/shoalfs/shoal/blockdev"
	"github.com/shoalfs/shoal/internal/image"
)

// MaxStage is the longest LayerProgress.stage, in bytes.
const MaxStage = 32

// NewWorking says how far layers are, the first MaxLayers of them.
func NewWorking(layers []image.Progress) *Working {
	w := &Working{}
	for _, l := range layers[:min(len(layers), MaxLayers)] {
		w.Layers = append(w.Layers, &LayerProgress{
			Digest: l.Layer[:], Stage: CleanText(string(l.Stage), MaxStage), Done: l.Done, Total: l.Total,
		})
	}
	return w
}

// Progress returns what x, which has been parsed, says.
func (x *Working) Progress() []image.Progress {
	var out []image.Progress
	for _, l := range x.GetLayers() {
		out = append(out, image.Progress{
			Layer: blockdev.Digest(l.GetDigest()), Stage: image.Stage(CleanText(l.GetStage(), MaxStage)), Done: l.GetDone(), Total: l.GetTotal(),
		})
	}
	return out
}

func checkWorking(w *Working) error {
	if n := len(w.GetLayers()); n > MaxLayers {
		return fmt.Errorf("progress of %d layers, at most %d are allowed", n, MaxLayers)
	}
	for i, l := range w.GetLayers() {
		switch {
		case len(l.GetDigest()) != digestLen:
			return fmt.Errorf("progress %d: digest of %d bytes, not %d", i, len(l.GetDigest()), digestLen)
		case l.GetDone() < 0 || l.GetTotal() < 0:
			return fmt.Errorf("progress %d: %d of %d bytes", i, l.GetDone(), l.GetTotal())
		}
	}
	return nil
}
