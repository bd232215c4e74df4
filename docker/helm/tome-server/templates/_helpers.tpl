{{- define "tome-server.name" -}}
{{- $name := ternary .Release.Name (printf "%s-tome-server" .Release.Name) (contains "tome-server" .Release.Name) -}}
{{- .Values.nameOverride | default $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "tome-server.selector" -}}
app.kubernetes.io/name: tome-server
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tome-server.labels" -}}
{{ include "tome-server.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The live r of the models that have one, as a document that the server follows; empty where none has. */}}
{{- define "tome-server.live" -}}
{{- $models := dict -}}
{{- range .Values.models -}}
{{- if .live -}}{{- $_ := set $models .name .live -}}{{- end -}}
{{- end -}}
{{- if and $models (not .Values.settings.shared_config) -}}{{- dict "models" $models | toYaml -}}{{- end -}}
{{- end -}}

{{/* The settings file of `tome-server serve`. */}}
{{- define "tome-server.settings" -}}
{{- range list "host" "port" "model" "protocol" "grpc_port" "threads" "state_dir" "api_key" "admin_key" "metrics_key" -}}
{{- if hasKey $.Values.settings . -}}{{- fail (printf "settings.%s: other values of this chart say it" .) -}}{{- end -}}
{{- end -}}
{{- $models := list -}}
{{- range .Values.models -}}{{- $models = append $models (omit . "live") -}}{{- end -}}
{{- $settings := dict "port" 8000 "model" $models -}}
{{- with .Values.protocols -}}{{- $_ := set $settings "protocol" . -}}{{- end -}}
{{- if .Values.grpc.enabled -}}{{- $_ := set $settings "grpc_port" .Values.grpc.port -}}{{- end -}}
{{- if include "tome-server.live" . -}}{{- $_ := set $settings "shared_config" "/etc/tome/live/config.yaml" -}}{{- end -}}
{{- range $key, $item := pick .Values.keys "api" "admin" "metrics" -}}
{{- if $item -}}{{- $_ := set $settings (printf "%s_key_file" $key) (printf "/etc/tome/keys/%s" $item) -}}{{- end -}}
{{- end -}}
{{- if gt (int .Values.gpu.count) 1 -}}
{{- $devices := list -}}
{{- range until (int .Values.gpu.count) -}}{{- $devices = append $devices (printf "cuda:%d" .) -}}{{- end -}}
{{- $_ := set $settings "device" (join "," $devices) -}}
{{- end -}}
{{- merge dict .Values.settings $settings | toYaml -}}
{{- end -}}

{{/* The resources of a replica, with its GPUs. */}}
{{- define "tome-server.resources" -}}
{{- $limits := .Values.resources.limits | default dict -}}
{{- with .Values.gpu -}}
{{- if .count -}}{{- $limits = merge (dict .resource .count) $limits -}}{{- end -}}
{{- end -}}
{{- merge (dict "limits" $limits) .Values.resources | toYaml -}}
{{- end -}}
