{{- define "shoal.labels" -}}
app.kubernetes.io/name: shoal
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ include "shoal.labelValue" (.Values.image.tag | default .Chart.AppVersion | splitList "@" | first) | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ include "shoal.labelValue" (printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_")) }}
{{- end }}

{{- /* A label's value has 63 characters at most, and begins and ends with a letter or digit. */}}
{{- define "shoal.labelValue" -}}
{{ . | trunc 63 | trimAll "-_." }}
{{- end }}

{{- /* Selectors of a component (list . "node"): they must never change. */}}
{{- define "shoal.selector" -}}
app.kubernetes.io/name: shoal
app.kubernetes.io/instance: {{ (first .).Release.Name }}
app.kubernetes.io/component: {{ last . }}
{{- end }}

{{- define "shoal.image" -}}
image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end }}

{{- define "shoal.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* The Secret that nodes join with: the token, and, if the supernodes are the
chart's, their addresses. */}}
{{- define "shoal.join" -}}
{{ .Release.Name }}-join
{{- end }}

{{- /* Another word if what supernodes write to that Secret is other. They write this word,
too, and the installers wait for it. */}}
{{- define "shoal.revision" -}}
{{ list (int .Values.supernode.replicas) .Values.supernode.addresses .Values.token.existingSecret | toJson | sha256sum | trunc 16 }}
{{- end }}

{{- /* Taints that the Jobs of helm uninstall tolerate: those of a machine on which pods do
run. To tolerate all would be to tolerate that a machine is away. */}}
{{- define "shoal.tolerations" -}}
- {key: shoal.dev/not-ready, operator: Exists}
- {key: node-role.kubernetes.io/control-plane, operator: Exists}
- {key: CriticalAddonsOnly, operator: Exists}
{{- with .Values.uninstall.tolerations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "shoal.check" -}}
{{- if and .Values.supernode.enabled .Values.supernodes }}
{{- fail "supernodes names supernodes that run elsewhere: set supernode.enabled to false, too" }}
{{- end }}
{{- if not .Values.supernode.enabled }}
{{- if not (and .Values.supernodes .Values.token.existingSecret) }}
{{- fail "supernode.enabled is false: set supernodes to the addresses of those that run elsewhere, and token.existingSecret to a Secret with their token" }}
{{- end }}
{{- end }}
{{- with .Values.supernode.addresses }}
{{- if ne (len .) (int $.Values.supernode.replicas) }}
{{- fail (printf "supernode.addresses has %d addresses for %d replicas: name one for each" (len .) (int $.Values.supernode.replicas)) }}
{{- end }}
{{- end }}
{{- end }}
