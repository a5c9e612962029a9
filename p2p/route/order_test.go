package route

import (
	"fmt"
	"slices"
	"testing"

	"github.com/shoalfs/shoal/blockdev"
)

// When one supernode goes, what belonged to the others stays where it is, and its
// own is spread over them.
func TestOrder(t *testing.T) {
	var ids []string
	for i := range 4 {
		ids = append(ids, fmt.Sprint("supernode", i))
	}
	owned, moved := map[string]int{}, map[string]int{}
	for i := range 2000 {
		key := blockdev.Sum([]byte(fmt.Sprint(i)))
		all := Order(key, ids)
		other := Order(key, []string{ids[3], ids[2], ids[1]})
		if backwards := Order(key, []string{ids[2], ids[0], ids[3], ids[1]}); !slices.Equal(all, backwards) {
			t.Fatal("the order depends on that of the list")
		}
		if rest := slices.DeleteFunc(slices.Clone(all), func(id string) bool { return id == ids[0] }); !slices.Equal(rest, other) {
			t.Fatalf("without one the order is %v, with it %v", other, all)
		}
		owned[all[0]]++
		if all[0] == ids[0] {
			moved[other[0]]++
		}
	}
	for _, id := range ids {
		if owned[id] < 400 || owned[id] > 600 {
			t.Errorf("%s owns %d of 2000", id, owned[id])
		}
	}
	for _, id := range ids[1:] {
		if moved[id] < 100 {
			t.Errorf("%s takes over %d of %d", id, moved[id], owned[ids[0]])
		}
	}
}
