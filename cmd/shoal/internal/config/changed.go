package config

import (
	"reflect"
	"strings"
)

// Values are the keys of a config file with what they are set to, sections with dots:
// "log.level".
func Values(c any) map[string]any {
	out := map[string]any{}
	collect(out, "", reflect.Indirect(reflect.ValueOf(c)))
	return out
}

func collect(out map[string]any, prefix string, v reflect.Value) {
	for i := range v.NumField() {
		key, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("toml"), ",")
		if f := v.Field(i); f.Kind() == reflect.Struct {
			collect(out, prefix+key+".", f)
		} else {
			out[prefix+key] = f.Interface()
		}
	}
}
