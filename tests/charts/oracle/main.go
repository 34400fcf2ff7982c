// The oracle: KubeRay's own validation, asked about rendered manifests.
//
// It reads manifests on standard input, a JSON string with YAML documents a line, and answers each line with a line of JSON:
// the RayJobs and RayClusters among them, and what the operator says of each. Fields that the operator's types do not have
// are errors, too: the API server would drop them without a word.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	rayv1 "github.com/ray-project/kuberay/ray-operator/apis/ray/v1"
	"github.com/ray-project/kuberay/ray-operator/controllers/ray/utils"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

type verdict struct {
	Checked []string `json:"checked"`
	Errors  []string `json:"errors"`
}

func main() {
	questions := bufio.NewScanner(os.Stdin)
	questions.Buffer(nil, 64<<20)
	answers := json.NewEncoder(os.Stdout)
	for questions.Scan() {
		var text string
		if err := json.Unmarshal(questions.Bytes(), &text); err != nil {
			panic(err)
		}
		result := verdict{Checked: []string{}, Errors: []string{}}
		for _, document := range strings.Split("\n"+text, "\n---\n") {
			result.check([]byte(document))
		}
		if err := answers.Encode(result); err != nil {
			panic(err)
		}
	}
	if err := questions.Err(); err != nil {
		panic(err)
	}
}

func (v *verdict) check(document []byte) {
	var meta struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`
	}
	if err := yaml.Unmarshal(document, &meta); err != nil {
		v.Errors = append(v.Errors, fmt.Sprintf("not YAML: %v", err))
		return
	}
	if meta.APIVersion != "ray.io/v1" {
		return
	}
	var errs []error
	switch meta.Kind {
	case "RayJob":
		job := &rayv1.RayJob{}
		if err := yaml.UnmarshalStrict(document, job); err != nil {
			errs = append(errs, err)
			break
		}
		errs = append(errs, utils.ValidateRayJobMetadata(job.ObjectMeta), utils.ValidateRayJobSpec(job))
	case "RayCluster":
		cluster := &rayv1.RayCluster{}
		if err := yaml.UnmarshalStrict(document, cluster); err != nil {
			errs = append(errs, err)
			break
		}
		errs = append(errs, utils.ValidateRayClusterMetadata(cluster.ObjectMeta),
			utils.ValidateRayClusterUpgradeOptions(cluster),
			utils.ValidateRayClusterSpec(&cluster.Spec, cluster.Annotations))
	default:
		errs = append(errs, fmt.Errorf("no rules for %s", meta.Kind))
	}
	v.Checked = append(v.Checked, meta.Kind+"/"+meta.Name)
	for _, err := range errs {
		if err != nil {
			v.Errors = append(v.Errors, fmt.Sprintf("%s/%s: %v", meta.Kind, meta.Name, err))
		}
	}
}
